#!/usr/bin/env bash
# The first day of a new user, command by command: own photographs to predictions, labelled scenes to results.
#
#   bash benchmarks/first_day.sh FOLDER           about ten minutes on two cores
#   bash benchmarks/first_day.sh FOLDER small     one method, one task, few images: a minute
#
# FOLDER must not exist. All is run in it; the data are made there by first_day.py.
set -euo pipefail
code=$(cd "$(dirname "$0")/.." && pwd)
size=${2:-full}
mkdir "$1"
cd "$1"
if [ "$size" = small ]; then
    images=16 methods="mae_mff" tasks="seg" epochs=3 rounds=3 iters=4
else
    images=120 methods="mae_mff ddae cim_pixels vision_electra revcol_v2" tasks="seg det" epochs=20 rounds=20 iters=80
fi
step() {
    echo
    printf "$ python"
    printf " %q" "$@"
    echo
    python "$code/$1" "${@:2}"
}
begin=$SECONDS
python "$code/benchmarks/first_day.py" . "$images"

if [ "$size" = full ]; then step mae_mff.py --data "my photos" --check_data; fi
for method in $methods; do
    step $method.py --data "my photos" --model nano --img_size 64 --epochs $epochs
    step $method.py --draw runs/$method/last.pth --data "my photos" --out $method.png
done
encoder=runs/mae_mff/encoder.pth

if [ "$size" = full ]; then
    step draw.py --attention $encoder --data "my photos"
    step finetune.py --data labelled --val_split 0.2 --check_data
    step finetune.py --data labelled --val_split 0.2 --weights $encoder --mode linear
    step finetune.py --data labelled --val_split 0.2 --weights $encoder --mode knn
    step finetune.py --data labelled --val_split 0.2 --weights $encoder --mode layers
    step finetune.py --data "my photos" --weights $encoder --mode features
fi
step finetune.py --data labelled --val_split 0.2 --weights $encoder --epochs $rounds
step finetune.py --data labelled --val_split 0.2 --weights runs/finetune/best.pth --mode evaluate
step finetune.py --predict "my photos" --weights runs/finetune/best.pth

for task in $tasks; do
    data=maps updates=$iters
    if [ $task = det ]; then data=boxes updates=12; fi  # seconds each, on a CPU
    if [ "$size" = full ]; then
        step transfer_seg_det.py --task $task --data $data --weights $encoder --check_data
    fi
    step transfer_seg_det.py --task $task --data $data --weights $encoder --img_size 64 --iters $updates
    step transfer_seg_det.py --task $task --data $data --weights runs/transfer_$task/model.pth --mode evaluate
    step transfer_seg_det.py --predict $data/images/val --weights runs/transfer_$task/model.pth --out predicted_$task
done
echo
echo "the whole way took $((SECONDS - begin)) s"
