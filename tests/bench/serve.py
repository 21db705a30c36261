"""What serving costs: `midiscover serve` beside a bare loop of transformers and torch that stops at the same layer.

    OMP_WAIT_POLICY=PASSIVE python -m tests.bench.serve --store STORE --sae ID [--seconds 20]

Everything on the same cores, the client too; no proxy, since one process of Ray Serve holds HTTP and the model. The
bare loop runs the language model up to the SAE's hook, encodes, takes the top 10 of each token, in this process on all
threads (the deployment is up and idle then). Texts are of 64 and of 512 tokens and never repeat: no cache helps.

  added          median over pairs, a text by the bare loop and another by a request, in turn; beside it what an empty
                 request (/health) takes, which is the share of HTTP and the guard
  throughput     16 at once, in texts a second, over the bare loop's one at a time, and over its whole forward pass;
                 median and range of three rounds, each beside its own bare loop
  open loop      Poisson arrivals at 70 and 80 % of that throughput: p50, p99, errors
  overload       four times that throughput: answers by status, memory, median after it

Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from rich import box
from rich.table import Table

from midiscover import tables
from midiscover.interpret import hook_of, load_language_model
from midiscover.saes import load_sae
from tests.bench.harvest import machine
from tests.serving import Deployment, deployed

LENGTHS = (64, 512)
TOP = 10
WARM = 8
ROUNDS, BURST, ALONE = 3, 32, 5
"""Of throughput; texts of a round at least; texts of the bare loop before each."""


class Bare:
    """The same work without a server."""

    def __init__(self, store: str, sae: str) -> None:
        self.sae = load_sae(sae, store=store)
        self.lm = load_language_model([self.sae], store)
        self.hook = hook_of(sae, self.sae)
        self.start: Any = self.lm.tokenizer.eos_token_id

    def one(self, text: str) -> Any:
        """Tokens, forward to the hook, encode, top of each token, as plain lists."""
        ids: Any = [self.start, *self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
        x = self.lm.activations(torch.tensor([ids]), [self.hook])[self.hook][0, 1:]
        top = self.sae.encode(x).topk(TOP, dim=1)
        return top.values.tolist(), top.indices.tolist()

    def whole(self, text: str) -> Any:
        """The same after the whole forward pass."""
        ids: Any = [self.start, *self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
        self.lm.logits(torch.tensor([ids]))
        return self.one(text)

    def texts(self, count: int, length: int, seed: int) -> list[str]:
        """Random words of about so many tokens; no two alike."""
        chance, made = random.Random(seed), []
        words = [str(self.lm.tokenizer.decode([i])) for i in range(2000, 12_000)]
        words = [word for word in words if word.strip().isalpha() and word.startswith(" ")]
        for _ in range(count):
            text = "".join(chance.choices(words, k=length))
            ids: Any = self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            made.append(self.lm.tokenizer.decode(ids[:length]))
        return made


def seconds_of(work: Callable[[str], Any], texts: Sequence[str]) -> list[float]:
    """Of each text, one after another."""
    found = []
    for text in texts:
        began = time.perf_counter()
        work(text)
        found.append(time.perf_counter() - began)
    return found


class Client:
    """Asks a deployment."""

    def __init__(self, running: Deployment, sae: str) -> None:
        self.running, self.sae = running, sae
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=512)
        self.http = httpx.AsyncClient(limits=limits, timeout=120)

    async def ask(self, text: str) -> tuple[int, float]:
        """Status and seconds."""
        body = {"text": text, "sae": self.sae, "top_k": TOP}
        began = time.perf_counter()
        try:
            answer = await self.http.post(
                f"{self.running.address}/interpret", headers=self.running.headers(), json=body
            )
            return answer.status_code, time.perf_counter() - began
        except httpx.HTTPError:
            return 0, time.perf_counter() - began

    async def one_by_one(self, texts: Sequence[str]) -> list[float]:
        """Seconds of each."""
        return [(await self.ask(text))[1] for text in texts]

    async def empty(self) -> float:
        """Seconds of a request for which nothing is done."""
        began = time.perf_counter()
        (await self.http.get(f"{self.running.address}/health")).raise_for_status()
        return time.perf_counter() - began

    async def at_once(self, texts: Sequence[str], concurrency: int) -> float:
        """Texts a second with so many under way."""
        waiting, began = list(texts), time.perf_counter()

        async def worker() -> None:
            while waiting:
                status, _ = await self.ask(waiting.pop())
                assert status == 200, status

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return len(texts) / (time.perf_counter() - began)

    async def open_loop(self, texts: Sequence[str], rate: float, seconds: float) -> list[tuple[int, float]]:
        """Poisson arrivals, whatever becomes of those before."""
        chance, tasks, began = random.Random(0), [], time.perf_counter()
        at = 0.0
        for text in texts:
            at += chance.expovariate(rate)
            if at > seconds:
                break
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(text)))
        return list(await asyncio.gather(*tasks))


def memory(running: Deployment) -> float:
    """MiB of the replicas."""
    return sum(process.memory_info().rss for process in running.workers("ServeReplica:midiscover")) / 2**20


async def throughput(bare: Bare, client: Client, length: int, burst: int, seed: int) -> tuple[float, float, float]:
    """Texts a second, 16 under way; beside it seconds of the bare loop, and of the whole forward pass, just before."""
    texts = bare.texts(burst + 2 * ALONE, length, seed=1000 * length + seed)
    one = statistics.median(seconds_of(bare.one, texts[:ALONE]))
    whole = statistics.median(seconds_of(bare.whole, texts[ALONE : 2 * ALONE])) - one  # `whole` runs both
    return await client.at_once(texts[2 * ALONE :], 16), one, whole


async def measured(bare: Bare, client: Client, args: argparse.Namespace) -> None:
    """All of it."""
    table = Table(
        "tokens",
        "bare p50",
        "served p50",
        "added",
        "empty",
        "bare texts/s",
        "16 at once",
        "ratio",
        "over whole",
        box=box.SIMPLE_HEAD,
    )
    rates = {}
    for length in LENGTHS:
        count = args.requests if length == LENGTHS[0] else max(WARM, args.requests // 6)
        texts = bare.texts(2 * count + 2 * WARM, length, seed=length)
        seconds_of(bare.one, texts[:WARM])
        await client.one_by_one(texts[WARM : 2 * WARM])
        parts = [texts[2 * WARM + i * count : 2 * WARM + (i + 1) * count] for i in range(2)]
        alone, served, empty = [], [], []
        for mine, theirs in zip(parts[0], parts[1], strict=True):
            alone += seconds_of(bare.one, [mine])
            served += await client.one_by_one([theirs])
            empty.append(await client.empty())
        rounds = [await throughput(bare, client, length, max(count, BURST), seed) for seed in range(ROUNDS)]
        rates[length] = statistics.median(rate for rate, _, _ in rounds)
        p50, of_bare = statistics.median(served), statistics.median(alone)
        added = statistics.median(one - other for one, other in zip(served, alone, strict=True))
        times = [f"{1000 * seconds:.1f} ms" for seconds in (of_bare, p50, added, statistics.median(empty))]
        ratios = [[rate * one for rate, one, _ in rounds], [rate * whole for rate, _, whole in rounds]]
        told = [f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})" for found in ratios]
        table.add_row(str(length), *times, f"{1 / of_bare:.2f}", f"{rates[length]:.2f}/s", *told)
    tables.show(table)
    rate = rates[LENGTHS[0]]
    loads = Table("load", "requests", "p50", "p99", "p99 / p50", "answers", "MiB", box=box.SIMPLE_HEAD)
    before = memory(client.running)
    for seed, share in enumerate((0.7, 0.8, 4.0), start=1):
        texts = bare.texts(int(1.5 * share * rate * args.seconds) + 50, LENGTHS[0], seed=seed)
        found = await client.open_loop(texts, share * rate, args.seconds)
        good = sorted(seconds for status, seconds in found if status == 200)
        p50, p99 = good[len(good) // 2], good[min(len(good) - 1, int(0.99 * len(good)))]
        told = ", ".join(f"{status}: {n}" for status, n in sorted(Counter(status for status, _ in found).items()))
        cells = (
            f"{1000 * p50:.0f} ms",
            f"{1000 * p99:.0f} ms",
            f"{p99 / p50:.1f}",
            told,
            f"{memory(client.running):.0f}",
        )
        loads.add_row(f"{share:.0%}", str(len(found)), *cells)
    await asyncio.sleep(5)
    after = statistics.median(await client.one_by_one(bare.texts(20, LENGTHS[0], seed=9)))
    tables.show(loads)
    print(f"MiB before: {before:.0f}. Median 5 s after the overload: {1000 * after:.1f} ms.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--requests", type=int, default=60, help="of 64 tokens, of each kind")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each open loop")
    args = parser.parse_args(argv)
    print(machine())
    bare = Bare(str(args.store), args.sae)
    with deployed(args.store, "--sae", args.sae, "--limits.concurrent_per_key", "64") as running:
        asyncio.run(measured(bare, Client(running, args.sae), args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
