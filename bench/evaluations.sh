#!/bin/sh
# Run every evaluation on two checkpoints, and leave their results as JSON: trained and untrained weights side by side.
#
#     sh bench/evaluations.sh TRAINED UNTRAINED DATA OUT
#
# DATA holds: imagenette/train and imagenette/val, butterflies/train and butterflies/val (labeled shards; the second has
# a few images of each class), photos (a folder of images), views (gnd_views.json and jpg/), and copies (a folder in the
# layout of Copydays). Cached features are kept in OUT/cache.
set -eu
trained=$1 untrained=$2 data=$3 out=$4
mkdir -p "$out"
command() { echo "dino-fast $*"; dino-fast "$@"; }

[ -d "$out/attacks" ] || command copies --make-attacks "$data/photos" "$out/attacks" --limit 100
for name in trained untrained; do
  [ $name = trained ] && weights=$trained || weights=$untrained
  here=$out/$name
  mkdir -p "$here"
  kept="--cache $out/cache --device cpu"
  command evaluate "$weights" --train "$data/imagenette/train" --val "$data/imagenette/val" \
    --retrieval "$data/views/gnd_views.json" --copies "$data/copies" --output "$here/quick" $kept
  command retrieval --checkpoint "$weights" --ground-truth "$data/views/gnd_views.json" --crop-queries \
    --json "$here/retrieval-cropped-queries.json" $kept
  command copies --checkpoint "$weights" --images "$out/attacks" --size 128 --json "$here/attacks.json" $kept
  command neighbors --checkpoint "$weights" --images "$data/photos" --output "$here/photos.png" \
    --json "$here/photos.json" $kept
  for set in imagenette butterflies; do
    sets="--train $data/$set/train --val $data/$set/val --limit 500"
    command linear --checkpoint "$weights" $sets --protocol published --epochs 20 --batch 128 --lrs 0.01,0.1,1 \
      --output "$here/linear-$set" --json "$here/linear-$set.json" $kept
    command finetune --checkpoint "$weights" $sets --epochs 20 --batch 32 --lrs 0.0005 \
      --output "$here/finetune-$set" --json "$here/finetune-$set.json" $kept
  done
done
