"""Which share of the samples is bad: counted over workers, weighed by what damage costs, ahead of shuffling."""

import pytest
from conversation_files import llava, write_json
from shard_files import numbers, pair, tokenize, write_shards, write_tar

from dtpvit.datamodules.bad_share import LEAST_SEEN, Examples, Seen, too_many_bad
from dtpvit.datamodules.instruction import InstructionData
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.datamodules.samples import ImageText
from dtpvit.errors import UserError
from dtpvit.interop.preprocessing import eval_transform


def loader(shards, **options):
    recipe = ImageText(eval_transform(8), tokenize)
    return ResumableLoader(shards, recipe, **({"batch_size": 4, "shuffle_buffer": 8} | options))


def test_reading_and_decoding_have_a_share_of_their_own():
    assert Seen().bad == 0 and Seen(lost=3).bad == 1
    assert Seen(found=100, tried=10, usable=5).bad == 0.5
    ahead = Seen(found=900, lost=100, tried=10, usable=10)  # 1,000 read, of which the 10 first were decoded
    assert ahead.bad == pytest.approx(0.1)
    assert Seen(found=900, lost=100, tried=450, usable=225).bad == pytest.approx(0.55)


def test_few_samples_are_never_too_many():
    few = Seen(found=LEAST_SEEN - 1, tried=LEAST_SEEN - 1)
    assert few.bad == 1 and too_many_bad(few, 0.1, {}, []) is None
    many = Seen(found=LEAST_SEEN, tried=LEAST_SEEN, usable=LEAST_SEEN // 2)
    assert too_many_bad(many, 0.5, {}, []) is None and too_many_bad(many, 1.0, {}, []) is None
    said = str(too_many_bad(many, 0.49, {"no image": 250, "no label": 0}, [("no image", "set/a\nb")]))
    assert "50% of" in said and "(no image: 250; such as set/a b (no image))" in said


def test_examples_are_the_first_of_each_cause():
    examples = Examples()
    for number in range(9):
        examples.add("no image" if number % 2 else "no caption", str(number))
    assert examples.new() == [("no caption", "0"), ("no image", "1"), ("no caption", "2"), ("no image", "3")] + [
        ("no caption", "4"), ("no image", "5")
    ]  # fmt: skip
    examples.add("no image", "10")
    assert examples.new() == []


@pytest.mark.parametrize("num_workers", [0, 3])
def test_what_was_read_is_counted_over_workers(tmp_path, num_workers):
    shards = write_shards(tmp_path, [12, 12], broken=(1, 4, 13))
    odd = {"a": {"txt": b"caption 1"}, "b": pair(24), "c": pair(25)}
    shards.append(write_tar(tmp_path / "00002.tar", odd))
    bad = loader(shards, train=False, num_workers=num_workers)
    for _ in range(2):
        assert sum(len(batch) for batch in numbers(bad)) == 23
        assert bad.seen == Seen(found=26, lost=1, tried=26, usable=23) and bad.seen.bad == pytest.approx(4 / 27)
        assert sorted(cause for cause, _ in bad.examples) == ["broken image"] * 3 + ["no image"]
        assert {where for _, where in bad.examples} >= {f"{tmp_path.name}/00002/a"}


def test_a_damaged_shard_has_lost_what_it_does_not_give(tmp_path):
    whole = write_tar(tmp_path / "0.tar", {f"{number:02d}": pair(number) for number in range(40)})
    with open(whole, "r+b") as file:
        file.truncate(len(file.read()) // 4)
    (tmp_path / "1.tar").write_bytes(b"")  # no _stats.json says how many it should have
    bad = loader([whole, str(tmp_path / "1.tar")], train=False)
    usable = sum(len(batch) for batch in numbers(bad))
    assert 5 < usable < 15 and bad.seen == Seen(found=usable, lost=40 - usable + 1, tried=usable, usable=usable)
    assert bad.skipped == {"unreadable shard": 2}


def test_samples_that_a_sound_shard_does_not_give_are_lost(tmp_path):
    shard = write_tar(tmp_path / "0.tar", {f"{number:02d}": pair(number) for number in range(41)})
    (tmp_path / "0_stats.json").write_text('{"successes": 44}')
    short = loader([shard], train=False)
    assert sum(len(batch) for batch in numbers(short)) == 41
    assert short.seen == Seen(found=41, lost=3, tried=41, usable=41) and short.skipped == {"unreadable shard": 1}
    assert short.examples[0][1].endswith("0.tar: 41 samples, 44 by its _stats.json or sizes.json")


def test_bad_records_are_too_many_before_any_work(tmp_path):
    records = [llava(number, image=False) for number in range(600)]
    for record in records[::5]:
        record["conversations"][1]["value"] = ""
    data = write_json(tmp_path, records)
    with pytest.raises(UserError, match=r"20% of .* judged by 600 \(empty answer: 120; such as record r0, turn 2"):
        InstructionData(train=data).setup("fit")
    few = write_json(tmp_path / "few", records[:400])
    for options in ({"train": few}, {"train": data, "max_skipped": 0.2}):
        with pytest.raises(UserError, match="has no chat"):  # which is asked for after the records were read
            InstructionData(**options).setup("fit")
