# Evaluates the networks of this leaderboard: sh evaluate.sh RECORDS
#
# In a folder with cifar10/, tiny-imagenet-100/ and runs/, which train.sh has filled. EfficientNet-Lite needs the repository's root on
# PYTHONPATH and `pip install 'msn-eval[examples]'`. A second call computes only what is missing.
set -eu
out=$1
export OMP_NUM_THREADS=1

measure() { # DATA FOLDER [OPTIONS]
    data=$1 folder=$2
    shift 2
    set -- --data "$data" --precision fp32 --out "$out/$folder" "$@"
    msn-eval --subset 1img,2imgs,5imgs,10imgs,1pct@1,10pct@1,full --probe logistic,knn,ridge,ncm --k 10 "$@"
    msn-eval --subset 2imgs,5imgs,10imgs,1pct@1,10pct@1 --probe linear "$@" # it chooses by labelled images, so 1 is not enough
}

for data in cifar10 tiny-imagenet-100; do
    runs=runs/$data
    measure "$data" "$data" --checkpoint "msn=$runs/msn-0" --checkpoint "msn-seed-1=$runs/msn-1" \
        --checkpoint "msn-no-masking=$runs/no-masking" --checkpoint "msn-no-me-max=$runs/no-me-max" \
        --checkpoint "simsiam=$runs/simsiam" --checkpoint pixels \
        --checkpoint 'untrained=random:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4'
    measure "$data" "$data-supervised" --checkpoint "supervised=$runs/supervised"
    for run in msn-0 no-masking no-me-max simsiam; do
        msn-eval watch "$runs/$run" --data "$data" --probe logistic --once
        mkdir -p "$out/trajectories/$data/$run"
        cp "$runs/$run"/eval/????????????????.* "$out/trajectories/$data/$run" # records; statistics of features have longer names
    done
    measure "$data" "$data-supervised" --image-pixels 64 \
        --checkpoint efficientnet-lite1=py:examples.encoders.efficientnet_lite:lite1 \
        --checkpoint efficientnet-lite2=py:examples.encoders.efficientnet_lite:lite2
done
