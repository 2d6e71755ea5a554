#!/usr/bin/env bash
# Several machines by hand: run this on each of them, with the same arguments. Needs a run.dir that all can see.
#
#   HEAD=node1 NODES=2 launchers/torchrun.sh model=llama3_8b run.dir=/shared/runs/first
#
#   HEAD              the machine on which the ranks meet (default: this one)
#   NODES             how many machines (default: 1)
#   DEVICES_PER_NODE  ranks of each machine (default: as many as it has GPUs)
#   PORT              on HEAD (default: 29500)
set -euo pipefail
exec python -m titan.launch.torchrun \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${DEVICES_PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-titan}" \
    -m titan.train "$@"
