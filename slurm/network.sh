# shellcheck shell=bash
# Where ranks meet, and NCCL's settings, in one place with their reasons. Sourced by slurm/stage.sh.

# The first node's address as Slurm knows it: its name need not resolve everywhere, and `hostname` may not be it.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
export MASTER_ADDR=${MASTER_ADDR:-$first_node}
# Two jobs that share a node must not meet at one port; below 32768, where the kernel hands out ports of its own.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))

# Sockets are for meeting, and for gloo; without a choice, NCCL may take a management network that is slow or filtered.
if [ -n "${PRISM_NEMO_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$PRISM_NEMO_INTERFACE GLOO_SOCKET_IFNAME=$PRISM_NEMO_INTERFACE
fi
# A failed collective ends the process with an error instead of leaving all others to wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Tensor parallelism overlaps its messages with products only if kernels start in the order in which they were queued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Warnings only; set NCCL_DEBUG=INFO to see which network NCCL chose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Retry a link that flaps for about a minute (timeout 4.096 us x 2^22 = 17 s, several times) before giving the job up.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
# Long rows leave holes in the caching allocator; segments that grow do not.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# One thread per rank: more threads than cores was seen to cost a factor of ten.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
