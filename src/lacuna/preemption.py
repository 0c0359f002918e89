"""What a cluster says before it takes a machine away: SIGTERM, or SIGUSR1 as `lacuna slurm` asks for."""

import os
import signal
import time
from threading import Thread

REPEATS = 2  # seconds in which a signal comes twice: Slurm signals torchrun and its ranks, and torchrun passes it on
REQUEUE = 75  # exit status: start me again, I go on from my checkpoint (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """The first signal asks for a checkpoint at the next step boundary, a later one ends the process at once.

    Where there is nothing new to save (data being tokenised, the first step being compiled, the model being exported),
    the first one ends it too: a compilation may take longer than the time that is left.
    """

    def __init__(self):
        self.asked = self.can_save = False
        # heard by a thread: Python's own handlers wait for the main one, which may stand in a collective for minutes
        pipe, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup)
        Thread(target=self.listen, args=[pipe], daemon=True).start()

    def listen(self, pipe: int):
        while True:
            if os.read(pipe, 1)[0] in SIGNALS:
                self.receive()

    def receive(self):
        if not self.can_save or (self.asked and time.monotonic() - self.first > REPEATS):
            os._exit(REQUEUE)
        if not self.asked:
            self.asked, self.first = True, time.monotonic()


def ignore_signals(worker: int = 0):
    """In a loader's process: Slurm signals all processes of a job, but only the rank decides when its workers end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
