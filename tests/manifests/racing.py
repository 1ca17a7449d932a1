"""Many who want to create the same object at once."""

from __future__ import annotations

import threading

from manifests.store import Store


def race(store: Store) -> None:
    """Eight threads create `commit`: exactly one may win, and what stands there is its."""
    won: list[int] = []
    ready = threading.Barrier(8)

    def create(n: int) -> None:
        ready.wait()
        if store.create("commit", str(n).encode()):
            won.append(n)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("commit") == str(won[0]).encode()
