"""The queue of requests for a worker: order, back-pressure, passing over, retries, and what it reports."""

import asyncio

import pytest

from actors.request_queue import RequestQueue


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


async def get(queue: RequestQueue, usable=lambda _: True):
    """The first usable request; waits for one."""
    while True:
        await queue.wait()
        request = queue.take(usable)
        if request is not None:
            return request
        await asyncio.sleep(0.001)


def test_first_in_first_out_within_a_priority_and_no_smaller_than_one():
    async def body():
        queue = RequestQueue("q", 6)
        for request in range(3):
            await queue.put(request)
        plain = [queue.take() for _ in range(3)]
        for request, step in (("later", 2), ("now", 1), ("late too", 2), ("retry", 0)):
            queue.add(request, (step,))
        return plain, [queue.take() for _ in range(5)]

    assert run(body()) == ([0, 1, 2], ["retry", "now", "later", "late too", None])
    with pytest.raises(ValueError, match="capacity"):
        RequestQueue("q", 0)


def test_a_full_queue_blocks_its_producer_until_there_is_room():
    async def body():
        queue, done = RequestQueue("q", 2), []

        async def produce():
            for request in range(5):
                await queue.put(request)
                done.append(request)

        task = asyncio.ensure_future(produce())
        await asyncio.sleep(0.05)
        assert done == [0, 1] and len(queue) == 2
        assert queue.take() == 0
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
        assert queue.take() == 5

    run(body())


def test_many_producers_never_overfill_it_and_a_cancelled_one_gives_its_room_on():
    async def body():
        queue, depths = RequestQueue("q", 2), []
        producers = [asyncio.ensure_future(queue.put(request)) for request in range(20)]
        await asyncio.sleep(0)
        assert len(queue) == 2
        queue.take()  # the third one is let in, but has not run yet
        producers[2].cancel()
        taken = []
        while len(taken) < 18:
            taken.append(await queue.get())
            await asyncio.sleep(0)
            depths.append(len(queue))
        await asyncio.gather(*producers, return_exceptions=True)
        return taken, max(depths)

    assert run(body()) == ([1, *range(3, 20)], 2)


def test_a_retried_request_needs_no_room_and_goes_first_by_its_priority():
    async def body():
        queue = RequestQueue("q", 1)
        await queue.put("old", (1,))
        queue.add("retry", (0,))
        return [queue.take(), queue.take()]

    assert run(body()) == ["retry", "old"]


def test_a_consumer_passes_over_what_it_may_not_take_until_that_changes():
    async def body():
        queue, banned = RequestQueue("q", 4), {1}
        await queue.put(1)
        taken = asyncio.ensure_future(get(queue, lambda request: request not in banned))
        await asyncio.sleep(0.02)
        assert not taken.done()
        await queue.put(2)
        assert await taken == 2
        taken = asyncio.ensure_future(get(queue, lambda request: request not in banned))
        banned.clear()
        assert await taken == 1

    run(body())


def test_a_withdrawn_request_leaves_its_room_and_is_never_taken():
    async def body():
        queue = RequestQueue("q", 1)
        await queue.put("withdrawn")
        waiting = asyncio.ensure_future(queue.put("kept"))
        await asyncio.sleep(0.01)
        queue.withdraw("withdrawn")
        queue.withdraw("withdrawn")
        await waiting
        assert len(queue) == 1 and queue.age() >= 0 and queue.waiting() == ["kept"]
        return queue.take(), queue.take()

    assert run(body()) == ("kept", None)


def test_more_requests_are_taken_as_far_as_they_fit_and_come_in_time():
    async def body():
        queue = RequestQueue("q", 9)
        for request in (3, 9, 2, 4, 1):
            await queue.put(request)
        # 9 and 4 are too large, 2 is refused
        first = await queue.take_more(6, int, 0.0, lambda request: request != 2)
        late = asyncio.create_task(queue.take_more(100, int, 0.2))
        await asyncio.sleep(0.02)
        await queue.put(5)
        second = await late
        await queue.put(7)
        return first, second, await queue.take_more(0, int, 9.0), queue.take()

    assert run(body()) == ([3, 1], [9, 2, 4, 5], [], 7)
