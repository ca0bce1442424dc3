#!/usr/bin/env bash
# Train the shipped model on your own videos and generate with the result.
#
#   examples/own_videos.sh MANIFEST FOLDER [key=value]...
#
# MANIFEST lists videos and captions (docs/data.md); `longvideo data shapeworld` writes one to try this with.
# FOLDER receives everything that is written. Further arguments change the training configuration.
set -euo pipefail
manifest=${1:?the first argument is a manifest.jsonl, see docs/data.md}
folder=${2:?the second argument is a folder to write}
shift 2

# Print what is wrong with the data set, before hours of work: missing files, damaged videos, empty captions.
longvideo data validate "$manifest" --chunks 2

# Encode every clip and caption once. Training reads latents afterwards, which is much faster than decoding videos.
# A command that was stopped continues when it is given again.
longvideo data encode "$manifest" --model tiny --chunks 2 --output "$folder/encoded"

# cpu/clips takes a minute or two on two cores. With eight GPUs and the 5B model the same training is
#   torchrun --nproc-per-node 8 -m longvideo train clips wan/ar data=FOLDER/encoded initialize=MODEL
longvideo train clips cpu/clips data="$folder/encoded" --output "$folder/training" "$@"

# The run folder holds a complete model.
longvideo generate "a red ball bounces" --model "$folder/training/model" --seconds 2 --output "$folder/result.mp4"
