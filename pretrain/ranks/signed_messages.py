"""Sign messages, so that only a process that knows the secret of a run can write them."""

from __future__ import annotations

import hashlib
import hmac

_DIGITS = 64


class Signer:
    """Signs texts, and recognises messages that were signed with the same secret."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(secret.encode()).digest()

    @property
    def name(self) -> str:
        """Return a name derived from the secret; the secret cannot be computed from it."""
        return self._digest("name")[:32]

    def sign(self, text: str) -> str:
        """Return a text preceded by its signature."""
        return self._digest(text) + text

    def opened(self, message: bytes) -> str | None:
        """Return the text of a message, or None if it was not signed with this secret."""
        found = message.decode(errors="replace")
        digest, text = found[:_DIGITS], found[_DIGITS:]
        own = self._digest(text)
        return text if hmac.compare_digest(digest.encode(), own.encode()) else None

    def _digest(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
