#!/usr/bin/env bash
# Distill a model that needs 8 steps with guidance into one that needs 2 steps without.
#
#   examples/distill.sh FOLDER [key=value]...
#
# FOLDER receives everything that is written. Further arguments change the configuration, such as
# `stages=[{frames: 16, batch: 1, steps: 500}]` for a longer training.
set -euo pipefail
folder=${1:?the first argument is a folder to write}
shift

# Only LoRA weights are trained. cpu/dmd is a short run from tiny-teacher on two cores: it shows the procedure, and its
# result is not good yet. `longvideo distill tiny/dmd` on one GPU is how the shipped model was made.
longvideo distill cpu/dmd --output "$folder/training" "$@"

# The run folder holds the adapter (lora/) and a model with the adapter in its weights (model/).
longvideo generate "a red ball bounces" --model "$folder/training/model" --seconds 2 --output "$folder/distilled.mp4"

# The adapter alone is small. It can be added to the model it was trained from at any time, here packed to 4 bits.
longvideo merge tiny-teacher "$folder/training/lora" "$folder/packed" --steps 2 --precision nvfp4
longvideo info "$folder/packed"
