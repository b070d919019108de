#!/usr/bin/env bash
# Trains a shipped family from its data: first stage and denoiser, then the alignment.
#   data/train.sh photos    one CPU thread, an hour       data/train.sh cats     the same
#   SCALE=20 data/train.sh cats                           on a GPU: that many times the steps
# A stopped run goes on where it was when the same command is given again. ARBSCALE_DATA names the
# data's folder (`python -m arbscale download afhq` fetches the cats), ARBSCALE_WEIGHTS AlexNet's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
family=${1:?name a family: cats or photos} scale=${SCALE:-1}

case $family in
  cats) data="afhq_cats --whole --larger afhq_cats/hi256" pool=12288 diffusion=6500 ;;
  photos) data="sr" pool=6144 diffusion=5500 ;;
  *) echo "there is no family $family; name cats or photos" >&2; exit 2 ;;
esac
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

# $data is several words.
# shellcheck disable=SC2086
$python -m arbscale train "$family" --data $data --joint --precision bf16 --pool $pool \
  --steps 0 $((5000 * scale)) $((diffusion * scale)) 0 --resume -o "runs/$family-unaligned"
# shellcheck disable=SC2086
$python -m arbscale train "$family" --start "runs/$family-unaligned" --data $data \
  --precision bf16 --steps 0 0 0 200 --sample-every 0 --resume --folder "runs/$family-aligned" \
  -o "data/$family"
