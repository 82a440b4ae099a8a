# What the batch scripts of this folder share; they source it inside the job. $here is the clone.
# shellcheck shell=bash

fail() {
    echo "error: $*" >&2
    exit 2
}

command -v srun >/dev/null ||
    fail "srun is not on PATH, so this is no SLURM cluster (or its module is not loaded);" \
        "on one machine: torchrun --standalone --nproc-per-node N train.py --config ..."
[ -n "${SLURM_JOB_ID:-}" ] ||
    fail "this is a batch script: submit it from the clone's folder with" \
        "sbatch scripts/slurm/${0##*/} ..."
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] ||
    fail "give sbatch --ntasks-per-node (one task for each GPU), not --ntasks alone."

# SAE_VENV names the virtual environment; without it .venv in the clone, else the python on PATH.
SAE_VENV=${SAE_VENV:-$here/.venv}
if [ -f "$SAE_VENV/bin/activate" ]; then
    # shellcheck disable=SC1091
    . "$SAE_VENV/bin/activate"
elif [ "$SAE_VENV" != "$here/.venv" ]; then
    fail "SAE_VENV=$SAE_VENV is not a virtual environment: it has no bin/activate."
fi
command -v python >/dev/null || fail "there is no python on PATH; name a virtual environment in SAE_VENV."

# Rank 0 runs on the first node, and so does this script: its ports can be looked at here.
if [ -z "${MASTER_ADDR:-}" ]; then
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
        fail "scontrol does not tell the nodes of this job; set MASTER_ADDR to the first one."
fi
port_in_use() { (: >"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
if [ -n "${MASTER_PORT:-}" ]; then
    ! port_in_use "$MASTER_PORT" ||
        fail "MASTER_PORT=$MASTER_PORT is in use on $(hostname); leave it out, or choose another."
else
    # Below the ports that systems hand out by themselves; jobs that share a node differ in their ids.
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    while port_in_use "$MASTER_PORT"; do MASTER_PORT=$((MASTER_PORT + 1)); done
fi
export MASTER_ADDR MASTER_PORT

# srun of 22.05 and later no longer takes --cpus-per-task over from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1 # the output file shows what happens when it happens

# A rank for each task. These come last on the command line: a --config behind them would undo them.
ranks=(--trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE")
