"""The sweep: what is missing of corpus and harvest, then the grid of SAEs. `python -m jobs.sweep CONFIG [--store URI]`

What a sweep does is in `sweeprun`, which imports torch and Ray Tune; here is how it begins and what it prints.
"""

from __future__ import annotations

from jobs.progress import Bars
from jobs.runtime import RayLater, run_main
from midiscover import tables
from midiscover.corpus import find_corpus
from midiscover.launch import Prepared, parse_job, prepare
from midiscover.store import layout


def main(argv: list[str]) -> int:
    """Run the sweep and print its table; 1 where an SAE failed."""
    with (
        prepare(parse_job("sweep", argv)) as prepared,
        Bars("sweep") as bars,
        RayLater(prepared.resolved.config.resources.nodes, bars.say) as session,
    ):
        if _will_work(prepared):
            session.begin_while_importing("jobs.sweeprun")
        from jobs.sweeprun import SweepRun

        run = SweepRun(prepared, bars, session)
        results = run.run()
    tables.show(tables.sweep_table(results.rows))
    tables.show(tables.quality_box(results.rows, run.stopwatch.minutes()))
    for sae, reason in run.retired().items():
        print(f"retired: {sae}: {reason}")
    for sae, reason in run.recorder.failures.items():
        print(f"failed: {sae}: {reason}")
    print(f"{run.id}\n{prepared.storage.uri}/{layout.sweep_file(run.id, 'report.html')}")
    return 1 if run.missing(results) else 0


def _will_work(prepared: Prepared) -> bool:
    """Whether Ray is as good as sure to be needed: what can go wrong with the text went well, and an SAE is missing.

    Not where nodes must be waited for: in those minutes the tracker should know of the sweep.
    """
    resolved, storage = prepared.resolved, prepared.storage
    if resolved.config.resources.nodes is not None:
        return False
    return find_corpus(storage, resolved.corpus_id) is not None and (
        prepared.args.force
        or not all(storage.exists(layout.evaluation(sae.id, resolved.evaluation_id)) for sae in resolved.saes)
    )


if __name__ == "__main__":
    run_main(main)
