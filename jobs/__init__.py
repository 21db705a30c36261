"""The Ray programs, one per stage. Each runs here and on a cluster by the same line: `python -m jobs.<stage> CONFIG`.

Ray reads these variables when it is imported, so they are set before any module of this package imports it.
"""

import os

for _name, _value in {
    # OpenMP's threads spin at barriers by default; where another process holds a core, a step then takes many times as
    # long (measured: tests/bench/RESULTS.md).
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "token",  # unset, driver and nodes of Ray 2.60 disagree about it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ warnings of normal events go to our users' terminals
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the tracker and the store are the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the job at once; the store is always in a state to go on from
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the default of 2 s is added to every report and to the end
}.items():
    os.environ.setdefault(_name, _value)

NICENESS = "MIDISCOVER_NICENESS"
"""Environment variable of a submitted job: the least niceness of its processes, 15 where it was submitted without one.
Ray gives workers 15 by itself, but not where a model of `midiscover serve` answers on the same cores."""
if NICENESS in os.environ:
    os.setpriority(os.PRIO_PROCESS, 0, max(int(os.environ[NICENESS]), os.getpriority(os.PRIO_PROCESS, 0)))
