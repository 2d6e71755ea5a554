"""What a conversation is: a list of messages, each with a role and a text, in which the assistant says something."""

from __future__ import annotations

ROLES = ("system", "user", "assistant", "tool")
"""Who can say something."""


class BadConversation(ValueError):
    """A conversation that cannot be encoded.

    Args:
        message: What is wrong with this one.
        reason: The same in few words, alike for all with the same mistake, to count them by.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_messages(messages: object) -> list[dict[str, str]]:
    """Return the role and the content of every message of a conversation.

    Raises:
        BadConversation: If there is none, if one has no known role or no text, or if the assistant says nothing.
    """
    if not isinstance(messages, list):
        raise BadConversation(
            f"the messages are of type {type(messages).__name__}, not a list", "messages are not a list"
        )
    if not messages:
        raise BadConversation("there are no messages", "no messages")
    checked = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, dict):
            raise BadConversation(
                f"{where} is of type {type(message).__name__}, not an object", "message is not an object"
            )
        if "role" not in message or ("content" not in message and not message.get("tool_calls")):
            missing = "role" if "role" not in message else "content"
            there = ", ".join(map(repr, message)) or "nothing"
            raise BadConversation(f"{where} has no {missing!r} (it has {there})", f"message without {missing!r}")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise BadConversation(f"{where} has the role {role!r}; there are {', '.join(ROLES)}", "unknown role")
        if message.get("tool_calls"):
            raise BadConversation(
                f"{where} calls tools, which titan does not write; put the call into its content", "tool calls"
            )
        if not isinstance(content, str):
            raise BadConversation(
                f"{where} has content of type {type(content).__name__}, not text", "content is not text"
            )
        checked.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise BadConversation("the assistant says nothing, so there is nothing to learn", "no assistant turn")
    return checked
