"""What ends a run early: SIGTERM, configs/slurm.sh's SIGUSR1, Ctrl-C, a terminal that is closed."""

import logging
import os
import signal
import time
from contextlib import suppress
from threading import Thread

REPEAT_SECONDS = 2  # Slurm signals torchrun and its ranks; so does torchrun
REQUEUE = 75  # exit status: start me again (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Preemption:
    """A signal asks for a checkpoint after the step; a later one ends the process at once."""

    def __init__(self):
        self.asked = False
        self.can_save = False  # before, one is enough: to compile may outlast the time left
        # Python's handlers wait for the main thread, which may stand in a collective for minutes. So the C handler
        # writes each signal's number into a pipe, and a thread reads it there.
        pipe, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda number, frame: None)
        Thread(target=self.listen, args=[pipe], daemon=True).start()

    def listen(self, pipe: int):
        first = float("inf")  # when the first one came
        while number := os.read(pipe, 1)[0]:
            if number not in SIGNALS:
                continue
            first = min(first, time.monotonic())
            # without a launcher, only a hand on the keyboard says it twice
            again = self.asked and number == signal.SIGINT and "RANK" not in os.environ
            if again or not self.can_save or time.monotonic() > first + REPEAT_SECONDS:
                with suppress(OSError):
                    os.write(2, f"\nlacuna: ended at once by signal {number}; run it again to go on\n".encode())
                os._exit(REQUEUE)
            self.asked = True
            logging.getLogger("lacuna").info("saving after this step; a second one ends it unsaved")
