"""How work is laid over nodes: what is asked for fits a node, and what does not fit is refused with the numbers."""

from __future__ import annotations

import math

import pytest

from jobs import nodes
from jobs.runtime import Cluster, Node, model_slots, on_cards, pack_slots
from midiscover.config import ResourcesConfig
from midiscover.errors import ConfigError, StageError


def laptop(cores: int) -> Cluster:
    return Cluster(local=True, cores=cores, nodes=(Node(max(cores + 1, 4), 0),))


def cpu_nodes(count: int, cpus: int) -> Cluster:
    return Cluster(local=False, cores=cpus, nodes=(Node(cpus, 0),) * count)


def gpu_nodes(*gpus: int) -> Cluster:
    return Cluster(local=False, cores=8, nodes=tuple(Node(8, n) for n in gpus))


@pytest.mark.parametrize(
    "cluster", [laptop(1), laptop(2), laptop(16), cpu_nodes(2, 4), cpu_nodes(4, 2), cpu_nodes(1, 64)]
)
@pytest.mark.parametrize("packs", [1, 2, 3, 5, 7, 40])
def test_every_worker_finds_a_node_and_a_cpu_stays_free(cluster: Cluster, packs: int) -> None:
    for slots in (pack_slots(cluster, ResourcesConfig(), packs), model_slots(cluster, ResourcesConfig())):
        assert 1 <= slots.count <= cluster.fits(slots.cpus, slots.gpus)
        assert slots.cpus <= max(node.cpus for node in cluster.nodes)
        assert sum(node.cpus for node in cluster.nodes) - slots.count * slots.cpus >= 1
        assert 1 <= slots.threads <= cluster.cores
        per_node = -(-slots.count // len(cluster.nodes))
        assert per_node * slots.threads <= cluster.cores


@pytest.mark.parametrize(
    ("cores", "packs", "count", "threads"), [(2, 3, 1, 2), (2, 2, 2, 1), (4, 3, 1, 4), (8, 1, 1, 8)]
)
def test_packs_on_one_machine_end_soonest(cores: int, packs: int, count: int, threads: int) -> None:
    slots = pack_slots(laptop(cores), ResourcesConfig(), packs)
    by_hand = {n: -(-packs // n) / (cores // n) ** 0.9 for n in range(1, cores + 1)}
    assert (
        by_hand[slots.count if slots.count <= packs else packs] <= min(by_hand.values()) + 1e-9 or slots.count == packs
    )
    assert (slots.count, slots.threads) == (count, threads)


def test_a_card_has_its_share_of_the_node_that_has_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own count of memory; a node without cards trains nothing where there are some."""
    have = [
        {"CPU": 8.0, "GPU": 2.0, "memory": 100.0},
        {"CPU": 8.0, "GPU": 1.0, "memory": 60.0},
        {"CPU": 8.0, "memory": 10.0},
        {"memory": 1.0},
    ]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in have])
    there = nodes.working_nodes()
    assert there == (Node(8, 2, 100), Node(8, 1, 60), Node(8, 0, 10))
    assert Cluster(local=False, cores=8, nodes=there).memory == 50
    assert Cluster(local=False, cores=8, nodes=there[2:]).memory == 10
    assert cpu_nodes(1, 4).memory == math.inf, "where nobody says"


def test_shares_of_a_gpu_never_span_two_cards() -> None:
    resources = ResourcesConfig(gpus_per_actor=0.6, gpus_per_pack=0.25)
    assert model_slots(gpu_nodes(3), resources).count == 3
    assert pack_slots(gpu_nodes(1, 1), resources, packs=40).count == 8
    assert pack_slots(gpu_nodes(1, 1), resources, packs=5).count == 5


@pytest.mark.parametrize(
    ("nodes", "share", "count"),
    [
        ([Node(4, 4)], 1.0, 3),
        ([Node(8, 8)], 1.0, 7),
        ([Node(1, 1), Node(1, 1)], 1.0, 1),
        ([Node(8, 1)], 0.125, 7),
        ([Node(9, 8)], 1.0, 8),
    ],
)
def test_where_cards_are_as_many_as_cpus_one_waits(nodes: list[Node], share: float, count: int) -> None:
    """For Ray's own tasks need a CPU; what is asked for by number is refused instead."""
    cluster = Cluster(local=False, cores=int(nodes[0].cpus), nodes=tuple(nodes))
    resources = ResourcesConfig(gpus_per_pack=share, gpus_per_actor=share)
    assert pack_slots(cluster, resources, packs=40).count == count
    assert model_slots(cluster, resources).count == count
    assert on_cards(cluster, share) == count, "by which a sweep cuts its packs"
    assert pack_slots(cluster, resources, packs=1).count == 1
    with pytest.raises(StageError, match=rf"needs {count + 1} workers of 1 CPUs"):
        model_slots(cluster, ResourcesConfig(gpus_per_actor=share, harvest_actors=count + 1))


def test_packs_of_several_workers_leave_a_cpu() -> None:
    cluster = Cluster(local=False, cores=8, nodes=(Node(8, 8),))
    slots = pack_slots(cluster, ResourcesConfig(workers=2), packs=40)
    assert (slots.count, slots.workers) == (3, 2)


def test_workers_of_a_pack_share_no_card() -> None:
    resources = ResourcesConfig(workers=2, gpus_per_pack=0.5)
    with pytest.raises(
        ConfigError, match=r"resources\.gpus_per_pack is 0.5, and must be 1 where resources\.workers is above 1"
    ):
        pack_slots(gpu_nodes(4), resources, packs=2)
    assert pack_slots(cpu_nodes(2, 4), resources, packs=2).workers == 2, "the share means nothing there"


def test_a_model_takes_whole_cards_of_one_node() -> None:
    resources = ResourcesConfig(gpus_per_model=4, gpus_per_actor=0.5)
    slots = model_slots(gpu_nodes(8, 4, 2), resources)
    assert (slots.count, slots.gpus) == (3, 4)
    with pytest.raises(StageError, match="needs 1 workers of 1 CPUs and 4 GPUs"):
        model_slots(gpu_nodes(2, 2), resources)


@pytest.mark.parametrize(("packs", "count"), [(1, 1), (2, 2), (9, 4)])
def test_a_shared_pack_takes_as_many_places_as_it_has_processes(packs: int, count: int) -> None:
    slots = pack_slots(gpu_nodes(4, 4), ResourcesConfig(workers=2), packs)
    assert (slots.count, slots.workers, slots.gpus) == (count, 2, 1)


@pytest.mark.parametrize("cluster", [laptop(2), cpu_nodes(2, 2), cpu_nodes(3, 4), cpu_nodes(1, 8)])
def test_processes_that_share_a_pack_find_a_node_each(cluster: Cluster) -> None:
    slots = pack_slots(cluster, ResourcesConfig(workers=2), packs=5)
    assert 2 * slots.count <= cluster.fits(slots.cpus, 0)
    assert sum(node.cpus for node in cluster.nodes) - 2 * slots.count * slots.cpus >= 1


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(StageError, match=r"The harvest needs 9 workers .*4 CPUs and 0 GPUs"):
        model_slots(laptop(2), ResourcesConfig(harvest_actors=9))
    with pytest.raises(StageError, match="needs 3 workers of 1 CPUs and 1 GPUs"):
        model_slots(gpu_nodes(2), ResourcesConfig(harvest_actors=3))
