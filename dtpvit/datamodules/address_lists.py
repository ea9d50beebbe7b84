"""Published lists of image addresses: their columns, their size, and what their makers' download gave."""

from dataclasses import dataclass, field

__all__ = ["LISTS", "AddressList"]


@dataclass(frozen=True)
class AddressList:
    """One list, and img2dataset's published parameters for it.

    Attributes:
        addresses: How many the published list has.
        file: The list, or the folder of its parquet files, within the data set's folder.
        source: Where the list is had.
        url: Column of the addresses.
        caption: Column of the captions.
        gigabytes: On disk, as img2dataset's authors report for the whole list.
        per_second: Addresses, as they report, on 16 cores.
        share: What is known of how many of the addresses still give an image.
        threads: A process.
        options: More options of img2dataset.
    """

    addresses: int
    file: str
    source: str
    url: str
    caption: str
    gigabytes: float
    per_second: int
    share: str
    threads: int
    options: dict[str, str | list[str]] = field(default_factory=dict)


LISTS = {
    "cc12m": AddressList(
        addresses=12_423_374,
        file="cc12m.tsv",
        source="https://github.com/google-research-datasets/conceptual-12m",
        url="url",
        caption="caption",
        gigabytes=331,
        per_second=630,
        share="reports of 2025 and 2026, not checked by us, got 62 to 64 %",
        threads=64,
        options={"user_agent_token": "img2dataset", "disallowed_header_directives": ["noai", "noindex"]},
    ),
    "laion400m": AddressList(
        addresses=407_332_084,
        file="laion400m-meta",
        source="LAION (https://laion.ai), the current, safety-checked release",
        url="URL",
        caption="TEXT",
        gigabytes=10_000,
        per_second=1300,
        share="how many are still there we do not know",
        threads=128,
        options={"save_additional_columns": ["NSFW", "similarity", "LICENSE"]},
    ),
}
