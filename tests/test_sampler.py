"""The order of samples: exact, the same on any number of ranks, a function of (digest, seed, epoch)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.sampler import MISSING, Deal, Sampler, deal_as

buckets_of = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array)
ours = settings(max_examples=50, deadline=None)


def sampler(buckets, global_batch=4, digest="d", seed=0):
    return Sampler(np.asarray(buckets), global_batch, digest, seed)


@ours
@given(buckets=buckets_of, global_batch=st.integers(1, 9), epoch=st.integers(0, 5), seed=st.integers(0, 3))
def test_an_epoch_has_every_sample_exactly_once(buckets, global_batch, epoch, seed):
    batches = sampler(buckets, global_batch, seed=seed).epoch(epoch)
    assert sorted(batches[batches != MISSING].tolist()) == list(range(len(buckets)))


@ours
@given(buckets=buckets_of, global_batch=st.integers(1, 9), epoch=st.integers(0, 5))
def test_a_batch_is_of_one_bucket_and_short_only_at_its_end(buckets, global_batch, epoch):
    order = sampler(buckets, global_batch)
    batches = order.epoch(epoch)
    assert batches.shape == (order.steps_per_epoch, global_batch)
    for batch in batches:
        filled = batch != MISSING
        assert filled[0]
        assert not (filled[1:] & ~filled[:-1]).any()
        assert len(set(buckets[batch[filled]])) == 1


@ours
@given(buckets=buckets_of, global_batch=st.integers(1, 9))
def test_each_bucket_has_at_most_one_short_batch(buckets, global_batch):
    batches = sampler(buckets, global_batch).epoch(0)
    short = batches[(batches == MISSING).any(axis=1)]
    assert len({buckets[batch[0]] for batch in short}) == len(short)


@ours
@given(
    buckets=buckets_of,
    batch_size=st.integers(1, 3),
    ranks=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 3),
)
def test_ranks_and_micro_batches_partition_every_global_batch(buckets, batch_size, ranks, accumulation):
    deal = Deal(batch_size, ranks, accumulation)
    for batch in sampler(buckets, deal.global_batch).epoch(0):
        micros = deal.micros(batch)
        dealt = [place for micro in range(micros) for rank in range(ranks) for place in deal.places(micro, rank)]
        assert dealt == list(range(len(dealt)))  # no place twice, and in order
        assert set(np.flatnonzero(batch != MISSING)) <= set(dealt)  # no sample left out
        assert batch[deal.places(micros - 1, 0)[0]] != MISSING  # no micro-batch is empty on all ranks


@ours
@given(buckets=buckets_of, accumulation=st.integers(1, 3))
def test_the_sequence_of_global_batches_does_not_depend_on_the_ranks(buckets, accumulation):
    deals = [
        Deal(1, 1, 4 * accumulation),
        Deal(2, 1, 2 * accumulation),
        Deal(1, 2, 2 * accumulation),
        Deal(1, 4, accumulation),
    ]
    orders = [sampler(buckets, deal.global_batch).epoch(1).tolist() for deal in deals]
    assert all(order == orders[0] for order in orders)


def test_the_order_is_another_for_each_epoch_seed_and_digest():
    buckets = np.zeros(40, int)
    orders = [
        sampler(buckets, seed=seed, digest=digest).epoch(epoch).ravel().tolist()
        for seed in (0, 1)
        for digest in ("a", "b")
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 8
    assert sampler(buckets, seed=1, digest="a").epoch(1).ravel().tolist() == orders[5]


def test_buckets_are_mixed_over_an_epoch():
    buckets = np.repeat([0, 1], 100)
    firsts = buckets[sampler(buckets).epoch(0)[:, 0]]
    assert 10 < np.count_nonzero(np.diff(firsts)) < 40  # 1 if one bucket came after the other


def test_a_sample_is_everywhere_in_the_epoch_equally_often():
    """A permutation with a favourite place would show over many epochs."""
    order = sampler(np.zeros(8, int), 1)
    places = np.array([order.epoch(epoch).ravel().tolist().index(3) for epoch in range(2000)])
    counts = np.bincount(places, minlength=8)
    assert np.sum((counts - 250) ** 2 / 250) < 24.3  # chi-square of 7 degrees of freedom: exceeded once in 1000


def test_a_step_is_a_row_of_its_epoch_whatever_was_asked_before():
    order = sampler(np.zeros(10, int), 4)
    assert order.steps_per_epoch == 3
    whole = np.concatenate([order.epoch(epoch) for epoch in range(6)])
    for step in (17, 0, 9, 16, 2, 8):
        assert order.batch(step).tolist() == whole[step].tolist()


def test_a_reader_that_is_epochs_ahead_takes_nothing_from_the_loop():
    """One step an epoch: what reads ahead asks for the order several epochs before the loop does."""
    order = sampler(np.zeros(3, int), 4)
    for step in range(12):
        ahead = order.batch(step + 5).tolist()
        assert order.batch(step).tolist() == order.epoch(step)[0].tolist()
        assert ahead == order.epoch(step + 5)[0].tolist()


def test_an_epoch_is_made_once_although_a_reader_is_several_ahead(monkeypatch):
    made: list[int] = []
    plain = Sampler.epoch

    def counted(self: Sampler, epoch: int) -> np.ndarray:
        made.append(epoch)
        return plain(self, epoch)

    monkeypatch.setattr(Sampler, "epoch", counted)
    sampler = Sampler(np.zeros(3, np.uint8), 1, "data set", seed=0)
    for step in range(90):
        sampler.batch(step + 16)
        sampler.batch(step)
    assert len(made) == len(set(made)) == 36
    assert len(sampler._epochs) < 30, "nor are all kept"


def test_three_samples_on_four_ranks_give_every_rank_the_same_number_of_micro_batches():
    deal = Deal(batch_size=2, ranks=4, accumulation=2)
    (batch,) = sampler(np.zeros(3, int), deal.global_batch).epoch(0)
    assert deal.micros(batch) == 1
    assert [[batch[place] != MISSING for place in deal.places(0, rank)] for rank in range(4)] == [
        [True, True],
        [True, False],
        [False, False],
        [False, False],
    ]


@pytest.mark.parametrize(
    ("batch_size", "ranks", "accumulation"), [(1, 1, 8), (1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 8, 1)]
)
def test_a_global_batch_is_dealt_to_other_ranks_by_accumulating(batch_size, ranks, accumulation):
    assert deal_as(8, batch_size, ranks) == Deal(batch_size, ranks, accumulation)


@pytest.mark.parametrize(("batch_size", "ranks"), [(3, 1), (1, 3), (1, 16), (16, 1), (2, 8)])
def test_a_global_batch_that_cannot_be_dealt_is_refused_by_name(batch_size, ranks):
    with pytest.raises(
        ConfigError, match=rf"global batch of 8 .* {ranks} processes .* --train_batch_size {batch_size}"
    ):
        deal_as(8, batch_size, ranks)


# --- weights, and batches that are not full


weighted = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.5])), min_size=1, max_size=40)


@ours
@given(samples=weighted, global_batch=st.integers(1, 5), epoch=st.integers(0, 3))
def test_a_sample_has_its_share_of_the_draws_rounded_up_or_down(samples, global_batch, epoch):
    buckets, weights = (np.array(column) for column in zip(*samples, strict=True))
    order = Sampler(buckets, global_batch, "d", 0, weights=weights)
    batches = order.epoch(epoch)
    assert len(batches) == order.steps_per_epoch
    drawn = np.bincount(batches[batches != MISSING], minlength=len(buckets))
    assert drawn.sum() == len(buckets)
    for bucket in set(buckets.tolist()):
        share = np.where(buckets == bucket, weights, 0)
        whole = len(buckets) * share.sum() / weights.sum()
        assert abs(drawn[buckets == bucket].sum() - whole) < 1
        exact = drawn[buckets == bucket].sum() * share / share.sum()
        assert (np.floor(exact - 1e-9) <= drawn * (share > 0)).all()
        assert (drawn * (share > 0) <= np.ceil(exact + 1e-9)).all()


@ours
@given(buckets=buckets_of, weight=st.sampled_from([0.1, 1.0, 7.0]), epoch=st.integers(0, 3))
def test_equal_weights_draw_every_sample_once(buckets, weight, epoch):
    batches = Sampler(buckets, 3, "d", 0, weights=np.full(len(buckets), weight)).epoch(epoch)
    assert sorted(batches[batches != MISSING].tolist()) == list(range(len(buckets)))


def test_over_many_epochs_the_draws_are_as_the_weights():
    weights = np.array([1.0, 2.0, 3.0, 0.5, 0.0, 1.0])
    order = Sampler(np.zeros(6, int), 2, "d", 0, weights=weights)
    drawn = np.zeros(6)
    for epoch in range(3000):
        batches = order.epoch(epoch)
        drawn += np.bincount(batches[batches != MISSING], minlength=6)
    np.testing.assert_allclose(drawn / drawn.sum(), weights / weights.sum(), atol=0.01)


def test_light_samples_among_a_million_have_their_share():
    """In float32, as the samples keep their weights, a running sum of so many loses what a light one adds."""
    count, light = 1_000_000, 100_000
    weights = np.ones(count, np.float32)
    weights[:light] = 0.01
    batches = Sampler(np.zeros(count, np.uint8), 4, "d", 0, weights=weights).epoch(0)
    drawn = np.count_nonzero(batches < light)
    assert drawn == pytest.approx(count * 0.01 * light / weights.sum(dtype=np.float64), rel=0.2)


@ours
@given(buckets=buckets_of, global_batch=st.integers(1, 5))
def test_dropping_the_last_leaves_full_batches_only(buckets, global_batch):
    order = Sampler(buckets, global_batch, "d", 0, drop_last=True)
    counts = np.unique(buckets, return_counts=True)[1]
    assert order.steps_per_epoch == sum(count // global_batch for count in counts)
    if order.steps_per_epoch:
        assert (order.epoch(0) != MISSING).all()
        assert len(set(order.epoch(0).flatten().tolist())) == order.epoch(0).size


@ours
@given(buckets=buckets_of, global_batch=st.integers(1, 5), held=st.sets(st.integers(0, 59)))
def test_only_the_numbers_that_are_trained_on_are_drawn(buckets, global_batch, held):
    numbers = np.array([number for number in range(len(buckets)) if number not in held], int)
    if len(numbers):
        batches = Sampler(buckets, global_batch, "d", 0, numbers).epoch(0)
        assert sorted(batches[batches != MISSING].tolist()) == numbers.tolist()


@ours
@given(
    samples=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.01, 1.0, 3.5])), min_size=1, max_size=40),
    global_batch=st.integers(1, 5),
    drop_last=st.booleans(),
    is_weighted=st.booleans(),
)
def test_what_is_told_to_be_left_out_is_what_no_epoch_has(samples, global_batch, drop_last, is_weighted):
    buckets, weights = (np.array(column) for column in zip(*samples, strict=True))
    if not is_weighted:
        weights = np.ones(len(buckets))
    if not weights.any():
        return
    order = Sampler(buckets, global_batch, "d", 0, None, weights if is_weighted else None, drop_last)
    seen: set[int] = set()
    for epoch in range(4 if order.steps_per_epoch else 0):
        batches = order.epoch(epoch)
        seen |= set(buckets[batches[batches != MISSING]].tolist())
    wanted = set(buckets[weights > 0].tolist())
    assert order.left_out == {bucket: ((buckets == bucket) & (weights > 0)).sum() for bucket in wanted - seen}
