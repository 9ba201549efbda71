# Trains the networks of this leaderboard: sh train.sh
#
# In a folder with cifar10/train/<class>/* and tiny-imagenet-100/train/<class>/*. Two runs at a time, one thread each. The same command
# continues what was interrupted. Only `supervised` uses labels: all of them, by fine-tuning the untrained network.
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
printf '%s\0' cifar10 tiny-imagenet-100 | xargs -0 -P 2 -I {} msn-eval --data {} --subset full --probe finetune --precision bf16 \
    --checkpoint 'supervised=random:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4' \
    --out runs/{}/supervised-training --save runs/{}/supervised finetune.epochs=6 finetune.batch=128 finetune.learning_rate=1e-3 \
    finetune.layer_decay=1 finetune.warmup_epochs=1 finetune.label_smoothing=0.1 finetune.crop_share=0.3 finetune.randaugment_magnitude=0
