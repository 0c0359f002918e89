"""What a cluster says before it takes a machine away: SIGTERM, or SIGUSR1 as `lacuna slurm` asks for."""

import os
import signal

REQUEUE = 75  # exit status: start me again, I go on from my checkpoint (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """The first signal asks for a checkpoint at the next step boundary, a second one ends the process at once.

    Where there is nothing new to save (data being tokenised, the first step being compiled, the model being exported),
    the first one ends it too: a compilation may take longer than the time that is left.
    """

    def __init__(self):
        self.asked = self.can_save = False
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.asked or not self.can_save:
            os._exit(REQUEUE)
        self.asked = True


def ignore_signals(worker: int = 0):
    """In a loader's process: Slurm signals all processes of a job, but only the rank decides when its workers end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
