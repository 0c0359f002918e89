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

# srun starts the ranks, and they meet by its variables: no torchrun stands between them and the signals.
# --kill-on-bad-exit: where one rank dies, the others end at once instead of waiting for it.
# --cpus-per-task: srun does not take sbatch's over by itself, and would give each rank one core.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
  "$PYTHON" -m lacuna "$@"
status=$?

# 75 says: saved, start me again (REQUEUE in src/lacuna/preemption.py). Any other status ends the job.
if [ $status = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
