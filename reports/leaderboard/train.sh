# Trains the self-supervised networks of this leaderboard: sh train.sh
#
# In a folder with cifar10/train/<class>/* and tiny-imagenet-100/train/<class>/*; labels are not used. Two runs at a time, one thread
# each. The same command continues what was interrupted.
set -eu
export OMP_NUM_THREADS=1
common="optimization.epochs=6 optimization.warmup=1 optimization.batch_size=128 run.keep_every=1 run.snapshot_minutes=5"
while read -r run recipe overrides; do
    for data in cifar10 tiny-imagenet-100; do
        printf '%s\0' "$recipe $common data.root=$data run.dir=runs/$data/$run $overrides"
    done
done <<RUNS | xargs -0 -P 2 -I {} sh -c 'msn-pretrain {}'
msn-0 msn_cifar10 run.seed=0
msn-1 msn_cifar10 run.seed=1
no-masking msn_cifar10 masking.ratio=0
no-me-max msn_cifar10 criterion.me_max_weight=0
simsiam simsiam_small_vit
RUNS
