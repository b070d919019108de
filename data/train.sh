#!/usr/bin/env bash
# Trains a family from its data, stage by stage, into data/FAMILY.
#   data/train.sh photos             one CPU thread, an hour; or cats, on two
#   SCALE=20 data/train.sh cats      that many times the steps, for a GPU
#   PROCESSES=2 data/train.sh cats   the denoiser in that many processes, on as many cores or GPUs
# ARBSCALE_DATA names the folder of the data: afhq_cats (`python -m arbscale download afhq`), or sr,
# any photographs; ARBSCALE_WEIGHTS may name one of AlexNet's weights, for LPIPS. A stopped run goes
# on where it was when the same command is given again.
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
    data=(--data afhq_cats --whole) mixed=(--data afhq_cats --whole) large=(--data afhq_cats --whole)
    # Where the cats are of 128 px, larger versions of some may lie beside them.
    if [ -d "$ARBSCALE_DATA/afhq_cats/hi256" ]; then
      mixed+=(--larger afhq_cats/hi256) large=(--data afhq_cats/hi256 --whole)
    fi
    train runs/cats-first "${mixed[@]}" --joint --steps 0 $((5000 * scale)) 0 0
    launch=("$python" -m torch.distributed.run --nproc_per_node "${PROCESSES:-1}" -m --)
    train runs/cats-denoiser --start runs/cats-first "${data[@]}" --pool 24576 \
      --steps 0 0 $((8500 * scale)) 0
    launch=("$python" -m)
    train runs/cats-unaligned --start runs/cats-denoiser "${large[@]}" \
      --steps 0 $((12000 * scale)) 0 0
    train data/cats --start runs/cats-unaligned "${data[@]}" --sample-every 0 --steps 0 0 0 200
    ;;
  photos)
    train runs/photos-unaligned --data sr --joint --pool 6144 \
      --steps 0 $((5000 * scale)) $((5500 * scale)) 0
    train data/photos --start runs/photos-unaligned --data sr --sample-every 0 --steps 0 0 0 200
    ;;
  *) echo "there is no family $family; name cats or photos" >&2; exit 2 ;;
esac
