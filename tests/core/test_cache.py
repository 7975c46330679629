"""The cache holds exactly the units it was given and not told to drop, whatever the order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import turned

from videoar.core.cache import KVCache

LAYERS, HEADS, HEAD_DIM, THETA = 2, 2, 12, 100.0


def _key_values(tokens: int, *, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values of a pass, per layer."""
    rng = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, tokens, HEAD_DIM)
    return [
        (torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))
        for _ in range(LAYERS)
    ]


SHAPE = (LAYERS, 2, 1, HEADS, HEAD_DIM)
PLACE = {"head_dim": HEAD_DIM, "theta": THETA}


def _reserve(cache: KVCache, tokens: int) -> None:
    cache.reserve(tokens, shape=SHAPE, like=torch.empty(0))


def _commit(cache: KVCache, unit: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Do as a pass and a sampler do: one leaves keys and values, the other counts them in."""
    update = _key_values(tokens, seed=unit)
    _reserve(cache, tokens)
    for layer, (key, value) in enumerate(update):
        cache.extend(layer, key, value)
    cache.commit([(unit, tokens)])
    return update


def _held(cache: KVCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pass of one token reads, without its own."""
    own = torch.zeros(1, HEADS, 1, HEAD_DIM)
    _reserve(cache, 1)
    key, value = cache.extend(layer, own, own)
    return key[:, :, :-1].clone(), value[:, :, :-1].clone()


OPERATIONS = st.lists(
    st.tuples(st.integers(1, 5), st.sets(st.integers(0, 12), max_size=4)), min_size=1, max_size=12
)


@given(OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_the_cache_holds_what_was_committed_and_not_evicted(operations) -> None:
    """Slots are reused in any order; a wrong hole would mix two units' keys without any error."""
    cache, expected = KVCache(), {}
    for unit, (tokens, dropped) in enumerate(operations):
        expected[unit] = _commit(cache, unit, tokens)
        cache.evict(sorted(dropped & cache.blocks.keys()))
        expected = {index: value for index, value in expected.items() if index not in dropped}
        assert cache.tokens == sum(value[0][0].shape[2] for value in expected.values())
        for layer in range(LAYERS):
            key, value = _held(cache, layer)
            for index, kept in expected.items():
                place = cache.blocks[index]
                assert torch.equal(key[:, :, place], kept[layer][0])
                assert torch.equal(value[:, :, place], kept[layer][1])


def test_a_pass_reads_the_cache_and_then_itself_and_changes_nothing() -> None:
    """A pass writes scratch only; else a rejected or repeated pass would corrupt the past."""
    cache = KVCache()
    committed = _commit(cache, 0, 3)
    before = cache.state_dict()
    for seed, tokens in ((7, 2), (8, 9), (9, 1)):
        _reserve(cache, tokens)
        for layer, (key, value) in enumerate(_key_values(tokens, seed=seed)):
            keys, values = cache.extend(layer, key, value)
            assert torch.equal(keys, torch.cat([committed[layer][0], key], dim=2))
            assert torch.equal(values, torch.cat([committed[layer][1], value], dim=2))
    after = cache.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_reach_the_keys_of_a_pass_and_never_those_of_the_cache() -> None:
    """A rollout trains its own pass; a gradient into the past would keep every graph alive."""
    cache = KVCache()
    past = [(k.requires_grad_(), v.requires_grad_()) for k, v in _key_values(2, seed=0)]
    _reserve(cache, 2)
    for layer, each in enumerate(past):
        cache.extend(layer, *each)
    cache.commit([(0, 2)])
    key, value = (part.requires_grad_() for part in _key_values(3, seed=1)[0])
    _reserve(cache, 3)
    keys, values = cache.extend(0, key, value)
    _reserve(cache, 3)
    cache.extend(0, key.detach() * 0, value.detach() * 0)  # the next pass uses the scratch again
    (keys.square().sum() + values.square().sum()).backward()
    torch.testing.assert_close(key.grad, 2 * key.detach())
    torch.testing.assert_close(value.grad, 2 * value.detach())
    assert past[0][0].grad is None


def _moved(key: torch.Tensor, frames: float) -> torch.Tensor:
    place = torch.tensor([[frames, 0.0, 0.0, 0.0]]).expand(key.shape[2], -1)
    return turned(key, place, theta=THETA)


def test_sinks_stand_where_they_were_placed_last() -> None:
    """Placements start from the commit; if they piled up, sinks would run away from the window."""
    cache = KVCache()
    sink, other = _commit(cache, 0, 2), _commit(cache, 1, 3)
    for frames in (1.0, 2.0, 500.0, 3.0):
        cache.place_sinks(1, frames, **PLACE)
        key, value = _held(cache, 1)
        torch.testing.assert_close(key[:, :, :2], _moved(sink[1][0], frames), atol=1e-5, rtol=1e-5)
        assert torch.equal(key[:, :, 2:], other[1][0])
        assert torch.equal(value[:, :, :2], sink[1][1])


def test_a_sink_committed_after_others_moved_starts_from_its_own_place() -> None:
    """With a lag the window may move while sinks are in flight; none may be turned twice."""
    cache = KVCache()
    first = _commit(cache, 0, 2)
    cache.place_sinks(2, 4.0, **PLACE)
    second = _commit(cache, 1, 3)
    cache.place_sinks(2, 6.0, **PLACE)
    key, _ = _held(cache, 0)
    expected = torch.cat([_moved(first[0][0], 6.0), _moved(second[0][0], 6.0)], dim=2)
    torch.testing.assert_close(key, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placed", [False, True])
def test_a_loaded_cache_goes_on_like_the_saved_one(placed: bool) -> None:
    """Its bits, its free slots and where its sinks came from are all in the state."""
    cache = KVCache()
    for unit in range(4):
        _commit(cache, unit, unit + 1)
    cache.evict([1])
    if placed:
        cache.place_sinks(1, 3.0, **PLACE)
    copy = KVCache()
    copy.load_state_dict({name: value.clone() for name, value in cache.state_dict().items()})
    for each in (cache, copy):
        _commit(each, 9, 2)
        each.evict([2])
        each.place_sinks(1, 7.0, **PLACE)
    for layer in range(LAYERS):
        for ours, theirs in zip(_held(cache, layer), _held(copy, layer), strict=True):
            assert torch.equal(ours, theirs)
    assert cache.blocks == copy.blocks


def test_a_saved_state_does_not_change_when_the_stream_goes_on() -> None:
    """A state is a snapshot: it must not share memory with the living cache."""
    cache = KVCache()
    _commit(cache, 0, 2)
    state = cache.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    _commit(cache, 1, 2)
    cache.place_sinks(1, 2.0, **PLACE)
    cache.evict([0])
    assert all(torch.equal(state[name], kept[name]) for name in kept)
