#!/usr/bin/env bash
# titan on Run:ai, with its command line of version 2. Arguments are Hydra overrides:
#
#   PROJECT=research IMAGE=registry/titan:0.1.0 launchers/kubernetes/runai.sh \
#       model=llama3_8b parallelism=fsdp run.dir=/shared/runs/first
#
#   PROJECT   the Run:ai project
#   IMAGE     built by launchers/docker/Dockerfile
#   WORKERS   nodes besides the first (default: 1)
#   GPUS      of each node (default: 8)
#   CLAIM     an existing ReadWriteMany volume claim, mounted at /shared (default: titan)
#   SECRET    a Kubernetes secret with the keys HF_TOKEN and WANDB_API_KEY (default: titan)
#   NAME      of the workload (default: titan)
set -euo pipefail
# The first pod (master) trains too, so it gets as many GPUs as the others. Run:ai starts it with the workers' command,
# and its operator tells torchrun, through PET_* variables, which node is which.
exec runai training pytorch submit "${NAME:-titan}" \
    --project "$PROJECT" \
    --image "$IMAGE" \
    --workers "${WORKERS:-1}" \
    --gpu-devices-request "${GPUS:-8}" \
    --master-gpu-devices-request "${GPUS:-8}" \
    --existing-pvc "claimname=${CLAIM:-titan},path=/shared" \
    --env-secret "HF_TOKEN=${SECRET:-titan},key=HF_TOKEN" \
    --env-secret "WANDB_API_KEY=${SECRET:-titan},key=WANDB_API_KEY" \
    --large-shm \
    --restart-policy OnFailure \
    --master-restart-policy OnFailure \
    --backoff-limit 6 \
    --termination-grace-period 5m \
    --command -- python -m titan.launch.torchrun --nproc-per-node "${GPUS:-8}" -m titan.train "$@"
