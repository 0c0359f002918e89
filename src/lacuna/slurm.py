"""`lacuna slurm`: a run as a job of Slurm, which comes back after a preemption or the time limit and goes on.

One task is one rank, which srun starts and signals itself; ranks meet by Slurm's own variables (parallel.py).
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from lacuna.config import Config, ConfigError
from lacuna.preemption import REQUEUE

SCRIPT = """#!/bin/bash
{options}
# USR1 goes to the ranks before the time limit, TERM when somebody preempts the job: they save and end with {requeue}.
# srun does not take over --cpus-per-task by itself.
srun --kill-on-bad-exit=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} {command}
status=$?
if [ $status = {requeue} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


def slurm(config: Config, words: list[str], submit: bool):
    """Write the script of `lacuna WORDS` to the run folder, and hand it to sbatch if asked."""
    folder = Path(config.out).absolute() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    asked = config.slurm
    options = {
        "job-name": config.name,
        "nodes": asked.nodes,
        "ntasks-per-node": max(1, asked.gpus),
        "gpus-per-node": asked.gpus or None,
        "output": folder / "slurm-%j.txt",
        "open-mode": "append",
        "signal": f"USR1@{asked.grace}",
        "chdir": Path.cwd(),
    }
    lines = [f"#SBATCH --{k}={quote(v)}" for k, v in (options | asked.options).items() if v is not None]
    command = shlex.join([sys.executable, "-m", "lacuna", *words])
    script = folder / "job.sh"
    script.write_text(SCRIPT.format(options="\n".join([*lines, "#SBATCH --requeue"]), command=command, requeue=REQUEUE))
    print(f"sbatch {shlex.quote(str(script))}")
    if submit:
        if shutil.which("sbatch") is None:
            raise ConfigError("--submit: there is no sbatch here; submit the script on a machine that has it")
        if subprocess.run(["sbatch", str(script)], check=False).returncode:
            raise ConfigError(f"sbatch refused {script}, as it says above: change slurm.options")


def quote(value) -> str:
    """For a line of #SBATCH: what came after a line break would be run by the shell."""
    return shlex.quote(" ".join(str(value).splitlines()))
