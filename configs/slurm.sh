#!/bin/bash
# A run as a job of Slurm. It comes back after its time limit or a preemption, and goes on from its checkpoint:
#
#   sbatch --nodes 2 --partition gpu --time 24:00:00 configs/slurm.sh pt CONFIG.toml --name NAME
#
# Before the script's name stand sbatch's own options, which win over those below; after it the words of lacuna's
# command. Submit it in the clone, so that .venv and configs are found; `out` must be a folder that all nodes see.

#SBATCH --job-name=lacuna
#SBATCH --nodes=1
# One task is one rank, on a GPU of its own: these two go together. On CPUs: --gpus-per-node 0 --ntasks-per-node 1.
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
# So many seconds before the time limit the ranks hear USR1, and save. The longest step and a save must fit into them.
# A preemption's TERM comes as early as the cluster's GraceTime says.
#SBATCH --signal=USR1@120
# Lets the job be queued again, by the last lines here and by Slurm itself where a node fails.
#SBATCH --requeue
# All starts of a job write into one file.
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append

# Not `uv run`: all ranks would look at the same moment whether .venv is up to date, and may change it.
PYTHON=${PYTHON:-.venv/bin/python}

# Where the ranks meet: on the first node, at a port that hardly another job has.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Each task learns by torchrun's variables which rank it is (of 8(x2) tasks per node the first number counts), and
# becomes it: with exec, no shell or torchrun stands between the rank and the signals.
# --export=ALL: else `sbatch --export=…` would keep MASTER_ADDR from them.
# --kill-on-bad-exit: where one rank dies, the others end at once instead of waiting for it.
# --cpus-per-task: srun does not take sbatch's over by itself, and would give each rank one core.
srun --export=ALL --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
  bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[!0-9]*}
    exec "$@"
  ' bash "$PYTHON" -m lacuna "$@"
status=$?

# 75 says: saved, start me again (REQUEUE in src/lacuna/preemption.py). Any other status ends the job.
if [ $status = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
