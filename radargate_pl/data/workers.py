"""What the processes that collate batches do about signals."""

import os
import signal
import threading

from radargate_pl.run_lock import forget_locks

# A terminal sends its own three (Ctrl-C, quit, hang-up) to every process of the command too.
ASKED_TO_STOP = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP}


def leave_signals_to_the_main_process(worker: int) -> None:
    """Make a loader's worker live until its main process ends it; for ``worker_init_fn``.

    Slurm, a terminal and ``kill`` send a signal to every process of a job. A worker that died of it would fail the
    very step whose checkpoint the main process is about to write; one that ignored it would outlive its parent, which
    ends its workers with SIGTERM. So a thread takes the signals in, and heeds only the parent's.

    Args:
        worker: its number.
    """
    forget_locks()
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED_TO_STOP)
    threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    while True:
        received = signal.sigwaitinfo(ASKED_TO_STOP)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
