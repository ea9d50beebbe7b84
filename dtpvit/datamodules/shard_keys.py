"""Which keys occur in more than one shard, for hundreds of millions of them."""

import zlib
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

__all__ = ["KeysOverShards"]


class KeysOverShards:
    """Keeps 8 bytes a key for the comparison, and the keys themselves compressed, to name examples."""

    def __init__(self) -> None:
        self._shards: list[str] = []
        self._hashes: list[np.ndarray] = []
        self._keys: list[bytes] = []

    def add(self, shard: str, keys: Sequence[str]) -> None:
        """The keys of one shard, each once."""
        digests = b"".join(blake2b(key.encode(), digest_size=8).digest() for key in keys)
        self._shards.append(shard)
        self._hashes.append(np.frombuffer(digests, dtype="<u8"))
        self._keys.append(zlib.compress("\n".join(keys).encode(), 1))

    def shared(self, examples: int = 5) -> tuple[int, dict[str, list[str]]]:
        """How many keys occur in several shards; some of them, with their shards."""
        if not self._hashes:
            return 0, {}
        values, counts = np.unique(np.concatenate(self._hashes), return_counts=True)
        several = values[counts > 1]
        named: dict[str, list[str]] = {}
        for shard, hashes, keys in zip(self._shards, self._hashes, self._keys, strict=True):
            places = np.flatnonzero(np.isin(hashes, several[:examples]))
            lines = zlib.decompress(keys).decode().split("\n") if len(places) else []
            for place in places:
                named.setdefault(lines[place], []).append(shard)
        return len(several), named
