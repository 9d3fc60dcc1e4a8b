"""Happenings: who listens hears everything in order, or how much was lost."""

import asyncio

import pytest

from irqrouter.service.status import Happenings, What

pytestmark = pytest.mark.asyncio


async def test_happenings_nobody_listens_nothing_is_kept() -> None:
    happenings = Happenings()
    assert not happenings
    happenings.tell("a", What.ATTACHED)
    with happenings.subscribed() as subscription:
        assert happenings
        happenings.tell("a", What.DETACHED)
        assert (await subscription.get()).what is What.DETACHED
    assert not happenings


async def test_happenings_wanted_while_somebody_listens() -> None:
    happenings = Happenings()
    waiting = asyncio.ensure_future(happenings.wanted())
    await asyncio.sleep(0)
    assert not waiting.done()
    with happenings.subscribed(), happenings.subscribed():
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(happenings.wanted(), 0.001)


async def test_subscription_loses_the_oldest_and_counts() -> None:
    happenings = Happenings()
    with happenings.subscribed() as slow, happenings.subscribed() as quick:
        for number in range(Happenings.KEPT + 3):
            happenings.tell("a", What.CAUGHT, 0, number)
            assert (await quick.get()).generation == number
        assert (slow.lost, quick.lost) == (3, 0)
        assert [each.generation for each in await slow.take(2)] == [3, 4]
        assert len(await slow.take(1 << 20)) == Happenings.KEPT - 2


async def test_subscription_take_waits_for_one_and_ends_when_told() -> None:
    happenings = Happenings()
    with happenings.subscribed() as subscription:
        taking = asyncio.ensure_future(subscription.take(5))
        await asyncio.sleep(0)
        happenings.tell("a", What.ATTACHED)
        happenings.tell("a", What.ADDED, 1)
        assert [each.what for each in await taking] == [What.ATTACHED, What.ADDED]
        taking = asyncio.ensure_future(subscription.take(5))
        await asyncio.sleep(0)
        subscription.end()
        assert await asyncio.wait_for(taking, 10) == []
        happenings.tell("a", What.DETACHED)
        assert await subscription.take(5) == []
