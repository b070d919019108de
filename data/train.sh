#!/usr/bin/env bash
# Trains a family from its data: first stage and denoiser, then the alignment, into data/FAMILY.
#   data/train.sh photos             one CPU thread, an hour; or cats
#   SCALE=20 data/train.sh cats      that many times the steps, for a GPU
# ARBSCALE_DATA names the folder of the data: afhq_cats (`python -m arbscale download afhq`), or sr,
# any photographs; ARBSCALE_WEIGHTS may name one of AlexNet's weights, for LPIPS. A stopped run goes
# on where it was when the same command is given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
family=${1:?name a family: cats or photos} scale=${SCALE:-1}
: "${ARBSCALE_DATA:?name the folder of the data}"

case $family in
  cats) data=(afhq_cats --whole) pool=12288 diffusion=6500 ;;
  photos) data=(sr) pool=6144 diffusion=5500 ;;
  *) echo "there is no family $family; name cats or photos" >&2; exit 2 ;;
esac
# Where the cats are of 128 px, larger versions of some may lie beside them.
if [ "$family" = cats ] && [ -d "$ARBSCALE_DATA/afhq_cats/hi256" ]; then
  data+=(--larger afhq_cats/hi256)
fi
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

"$python" -m arbscale train "$family" --data "${data[@]}" --joint --precision bf16 --pool $pool \
  --steps 0 $((5000 * scale)) $((diffusion * scale)) 0 --resume -o "runs/$family-unaligned"
"$python" -m arbscale train "$family" --start "runs/$family-unaligned" --data "${data[@]}" \
  --precision bf16 --steps 0 0 0 200 --sample-every 0 --resume --folder "runs/$family-aligned" \
  -o "data/$family"
