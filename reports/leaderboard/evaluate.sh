# Evaluates every network of this leaderboard: sh evaluate.sh RECORDS
#
# In a folder with cifar10/, tiny-imagenet-100/ and runs/, which train.sh has filled. EfficientNet-Lite needs the repository's root on
# PYTHONPATH and `pip install 'msn-eval[examples]'`. A second call computes only what is missing.
set -eu
out=$1
export OMP_NUM_THREADS=1
network='vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4'

measure() { # DATA GROUP [OPTIONS]
    data=$1 group=$2
    shift 2
    msn-eval --data "$data" --subset 1img,2imgs,5imgs,10imgs,1pct@1,10pct@1,full --probe logistic,knn,ridge,linear,ncm --k 10 \
        --precision fp32 --out "$out/$group" "$@"
}

for data in cifar10 tiny-imagenet-100; do
    runs=runs/$data
    measure "$data" self-supervised --checkpoint "msn=$runs/msn-0" --checkpoint "msn-seed-1=$runs/msn-1" \
        --checkpoint "msn-no-masking=$runs/no-masking" --checkpoint "msn-no-me-max=$runs/no-me-max" \
        --checkpoint "simsiam=$runs/simsiam" --checkpoint "untrained=random:$network" --checkpoint pixels
    # The supervised network of the same size: all weights trained with all labels, with the crops of fine-tuning.
    msn-eval --data "$data" --checkpoint "supervised=random:$network" --subset full --probe finetune --precision bf16 \
        --out "runs/$data/supervised-training" --save "runs/$data/supervised" finetune.epochs=6 finetune.batch=128 \
        finetune.learning_rate=1e-3 finetune.layer_decay=1 finetune.warmup_epochs=1 finetune.weight_decay=0.05 \
        finetune.label_smoothing=0.1 finetune.crop_share=0.3 finetune.randaugment_magnitude=0
    measure "$data" supervised --checkpoint "supervised=$(ls runs/$data/supervised/*.safetensors)"
    measure "$data" supervised --image-pixels 96 \
        --checkpoint efficientnet-lite1=py:examples.encoders.efficientnet_lite:lite1 \
        --checkpoint efficientnet-lite2=py:examples.encoders.efficientnet_lite:lite2
done
