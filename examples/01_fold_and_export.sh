#!/usr/bin/env bash
# Fold a model, export it, and see it proven; the same from Python is 01_fold_and_export.py.
# Run it in a folder where it may write:  bash examples/01_fold_and_export.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python "$here/shop_net.py"                                           # makes shop.pt, a state_dict
bnfix info shop.pt                                                   # what is it? nothing is unpickled
bnfix fold shop.pt --arch "$here/shop_net.py:ShopNet" --input 2x3x24x24 -o shop_folded.pt
bnfix export shop_folded.pt --arch "$here/shop_net.py:ShopNet" --input 2x3x24x24 -o shop.onnx
bnfix verify shop.pt shop.onnx --arch "$here/shop_net.py:ShopNet" --data "$here/shop_net.py:batches"
