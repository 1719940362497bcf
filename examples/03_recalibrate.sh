#!/usr/bin/env bash
# Set running statistics anew, from files; the same from Python is 03_recalibrate.py.
# Run it in a folder where it may write:  bash examples/03_recalibrate.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python "$here/shop_net.py"                                           # makes shop.pt, a state_dict
arch=(--arch "$here/shop_net.py:ShopNet" --data "$here/shop_net.py:batches")
bnfix recalibrate shop.pt "${arch[@]}" --dry-run && echo "it fits already" || echo "exit code $?: it would change something"
bnfix recalibrate shop.pt "${arch[@]}" --certify full -o shop_fixed.pt
bnfix recalibrate shop_fixed.pt "${arch[@]}" --dry-run               # 0: nothing left to change
