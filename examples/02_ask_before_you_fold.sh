#!/usr/bin/env bash
# See what would happen, without changing anything; the same from Python is 02_ask_before_you_fold.py.
# A dry run exits with 1 if it would change something: a check for a pipeline that expects folded models.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python "$here/shop_net.py"
if bnfix fold shop.pt --arch "$here/shop_net.py:ShopNet" --input 2x3x24x24 --dry-run --output-format concise; then
    echo "nothing to fold"
else
    echo "there is something to fold (exit code $?)"
fi
