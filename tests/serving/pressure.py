"""More requests at once than the server has room for."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np


def press(url: str, *, requests: int, form: dict[str, Any]) -> dict[str, Any]:
    """Opens a connection for every request, then sends all of them at once.

    Returns:
      How many ended with which status; ``refusal_ms``: percentiles of the time from sending to the complete 429; ``seconds`` in all.
    """
    began = time.monotonic()
    gc.disable()  # the time is the server's: a client that looks for garbage meanwhile would add its own
    try:
        answers = asyncio.run(_press(url, requests, form))
    finally:
        gc.enable()
    refusals = [1000 * seconds for status, seconds, _ in answers if status == 429]
    statuses, counts = np.unique([status for status, _, _ in answers], return_counts=True)
    complete = [body for status, _, body in answers if status == 200]
    return {
        "statuses": {str(status): int(count) for status, count in zip(statuses, counts, strict=True)},
        "complete": sum(json.loads(body)["finish_reason"] == "length" for body in complete),
        "retry_after": all(b"retry-after: 1" in body for status, _, body in answers if status == 429),
        "refusal_ms": {f"p{p}": round(float(np.percentile(refusals, p)), 2) for p in (50, 90, 99)} if refusals else None,
        "seconds": round(time.monotonic() - began, 2),
    }


async def _press(url: str, requests: int, form: dict[str, Any]) -> list[tuple[int, float, bytes]]:
    address = urlsplit(url)
    body = json.dumps(form).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connections = [await asyncio.open_connection(address.hostname, address.port) for _ in range(requests)]
    await asyncio.sleep(0.5)  # until the server has accepted them, too

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, float, bytes]:
        sent = time.perf_counter()
        writer.write(head.encode() + body)
        header = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in header.lower().splitlines() if line.startswith(b"content-length"))
        answer = await reader.readexactly(length)
        seconds = time.perf_counter() - sent
        writer.close()
        status = int(header.split()[1])
        return status, seconds, header.lower() if status == 429 else answer

    return await asyncio.gather(*(one(*connection) for connection in connections))
