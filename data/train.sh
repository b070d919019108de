#!/usr/bin/env bash
# Trains a family and writes data/FAMILY: this REPLACES the shipped weights. A simpler recipe than
# the one in the card; neither has been run as a whole.
#   data/train.sh photos             hours of one CPU thread
#   PROCESSES=2 data/train.sh cats   days of a CPU; that many processes train the denoiser
#   SCALE=2 data/train.sh cats       that many times the steps
# ARBSCALE_DATA names the folder of the data: afhq_cats (`python -m arbscale download afhq`; a copy
# at 256 px, afhq_cats256, loads faster), or sr, any photographs. ARBSCALE_WEIGHTS names the folder
# of published weights: taesd (`python -m arbscale download taesd`), for cats, and AlexNet's, for
# LPIPS. Rerun the same command to resume a stopped run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
family=${1:?name a family: cats or photos} scale=${SCALE:-1}
: "${ARBSCALE_DATA:?name the folder of the data}"
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

launch=("$python" -m)
train() { # FOLDER OPTIONS: some stages, from which FOLDER gets the weights
  local options=(--precision bf16 --resume --folder "runs/${1##*/}")
  "${launch[@]}" arbscale train "$family" "${options[@]}" -o "$@"
}

case $family in
  cats)
    data=(--data afhq_cats --whole) # of any size from 256 px on
    if [ -d "$ARBSCALE_DATA/afhq_cats256" ]; then data=(--data afhq_cats256 --whole); fi
    teacher=${ARBSCALE_WEIGHTS:?name the folder of taesd/taesd_encoder.safetensors}
    teacher=$teacher/taesd/taesd_encoder.safetensors
    train runs/cats-first "${data[@]}" --teacher "$teacher" --steps 0 $((9000 * scale)) 0 0
    launch=("$python" -m torch.distributed.run --nproc_per_node "${PROCESSES:-1}" -m --)
    train runs/cats-denoiser --start runs/cats-first "${data[@]}" --ema-decay 0.9995 \
      --steps 0 0 $((47000 * scale)) 0
    launch=("$python" -m)
    train runs/cats-student --start runs/cats-denoiser "${data[@]}" --teacher "$teacher" \
      --preset.tiny-channels 40 --steps $((1500 * scale)) 0 0 0
    train runs/cats-adversarial --start runs/cats-student "${data[@]}" --resampled 0.5 \
      --preset.first-stage-lr 4e-4 --preset.adversarial-weight 0.3 --steps 0 $((1000 * scale)) 0 0
    "${launch[@]}" arbscale blend runs/cats-student runs/cats-adversarial -o runs/cats-blend
    train runs/cats-guide "${data[@]}" --teacher "$teacher" \
      --preset.denoiser unet --preset.unet-multipliers 1 1 1 --steps 0 0 400 0 --ema-decay 0.99
    "${launch[@]}" arbscale guide runs/cats-blend runs/cats-guide -o data/cats --weight 1.85
    ;;
  photos)
    train runs/photos-encoded --data sr --joint --pool 6144 \
      --steps 0 $((5000 * scale)) $((6500 * scale)) 0
    train data/photos --start runs/photos-encoded --data sr --resampled 0.7 \
      --preset.first-stage-lr 6e-4 --steps 0 $((5200 * scale)) 0 0
    ;;
  *) echo "there is no family $family; name cats or photos" >&2; exit 2 ;;
esac
