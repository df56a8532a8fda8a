"""The bounded queues: order, real back-pressure, passing over, retries, and what they report."""

import asyncio

import pytest

from actors.queues import BoundedQueue


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_first_in_first_out_and_no_smaller_than_one():
    async def body():
        queue = BoundedQueue("q", 3)
        for item in range(3):
            await queue.put(item)
        return [await queue.get() for _ in range(3)]

    assert run(body()) == [0, 1, 2]
    with pytest.raises(ValueError, match="capacity"):
        BoundedQueue("q", 0)


def test_a_full_queue_blocks_its_producer_until_there_is_room():
    async def body():
        queue, done = BoundedQueue("q", 2), []

        async def produce():
            for item in range(5):
                await queue.put(item)
                done.append(item)

        task = asyncio.ensure_future(produce())
        await asyncio.sleep(0.05)
        assert done == [0, 1] and len(queue) == 2
        assert await queue.get() == 0
        await asyncio.sleep(0.05)
        assert done == [0, 1, 2] and len(queue) == 2
        assert [await queue.get() for _ in range(4)] == [1, 2, 3, 4]
        await task
        stats = queue.drain_stats()
        assert stats["depth"] == 2 and stats["blocked_s"] > 0.04 and stats["wait_s"] > 0
        assert queue.drain_stats() == {"depth": 0.0, "wait_s": 0.0, "blocked_s": 0.0, "age_s": 0.0}
        await queue.put(5)
        await asyncio.sleep(0.05)
        assert queue.drain_stats()["age_s"] > 0.04
        assert await queue.get() == 5

    run(body())


def test_a_retried_item_goes_first_even_when_full():
    async def body():
        queue = BoundedQueue("q", 1)
        await queue.put("old")
        await queue.put_back("retry")
        return [await queue.get(), await queue.get()]

    assert run(body()) == ["retry", "old"]


def test_a_consumer_passes_over_what_it_may_not_take_until_that_changes():
    async def body():
        queue, banned = BoundedQueue("q", 4), {1}
        await queue.put(1)
        taken = asyncio.ensure_future(queue.get(lambda item: item not in banned))
        await asyncio.sleep(0.02)
        assert not taken.done()
        await queue.put(2)
        assert await taken == 2
        taken = asyncio.ensure_future(queue.get(lambda item: item not in banned))
        banned.clear()
        await queue.poke()
        assert await taken == 1

    run(body())


def test_a_cancelled_consumer_takes_nothing():
    async def body():
        queue = BoundedQueue("q", 2)
        waiting = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await queue.put("kept")
        assert len(queue) == 1 and queue.age() >= 0
        assert await queue.get() == "kept"

    run(body())


def test_an_item_is_offered_to_one_of_many_waiting_consumers():
    async def body():
        queue, asked = BoundedQueue("q", 4), []
        waiting = [asyncio.ensure_future(queue.get(lambda item, i=i: not asked.append(i))) for i in range(200)]
        await asyncio.sleep(0)
        for item in range(3):
            await queue.put(item)
        done, _ = await asyncio.wait(waiting[:3])
        assert [task.result() for task in waiting[:3]] == [0, 1, 2] and asked == [0, 1, 2] and len(done) == 3
        for task in waiting:
            task.cancel()

    run(body())


def test_an_item_handed_to_a_consumer_that_is_cancelled_is_not_lost():
    async def body():
        queue = BoundedQueue("q", 1)
        waiting = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0)
        await queue.put("item")  # handed over, but the consumer has not run yet
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return await queue.get()

    assert run(body()) == "item"


def test_a_consumer_gives_up_when_it_is_told_to():
    async def body():
        queue, over = BoundedQueue("q", 1), []
        waiting = asyncio.ensure_future(queue.get_until(lambda: bool(over)))
        await asyncio.sleep(0.01)
        over.append(True)
        await queue.poke()
        assert await waiting is None
        await queue.put("kept")
        assert await queue.get_until(lambda: True) is None and len(queue) == 1

    run(body())


def test_more_items_are_taken_as_far_as_they_fit_and_come_in_time():
    async def body():
        queue = BoundedQueue("q", 9)
        for item in (3, 9, 2, 4, 1):
            await queue.put(item)
        first = await queue.get_more(6, int, 0.0, lambda item: item != 2)  # 9 and 4 are too large, 2 is refused
        late = asyncio.create_task(queue.get_more(100, int, 0.2))
        await asyncio.sleep(0.02)
        await queue.put(5)
        second = await late
        await queue.put(7)
        return first, second, await queue.get_more(0, int, 9.0), await queue.get()

    assert run(body()) == ([3, 1], [9, 2, 4, 5], [], 7)
