"""The last step of a recipe: push the verified entry. `zoo.hub.push` does it; this says when and what."""

from __future__ import annotations

import cards
from pipelines.recipe import Publish
from zoo.entry import Entry
from zoo.files import Store
from zoo.hub import client
from zoo.hub.push import push
from zoo.progress import say
from zoo.registry import Registry
from zoo.speeds import together


def check(setting: Publish) -> None:
    """Raise HubError if the token may not publish: better now than after hours."""
    client.user(client.connect(setting.endpoint))


def publish(entry: Entry, setting: Publish, store: Store, registry: Registry) -> Entry:
    """Push an entry that is in the store and the registry; return it as it is recorded then."""
    publication = push(
        entry.id,
        client.connect(setting.endpoint),
        store=store.root,
        registry=registry,
        card=cards.render,
        to=setting.to,
        private=setting.private,
    )
    say(f"published: {publication.endpoint}/{publication.repository}/tree/{publication.tag}")
    return registry.get(entry.id)


def still_known(entry: Entry, registry: Registry) -> Entry:
    """A newly made entry with what the registry knows of the same files: speeds, and publications."""
    known = registry.find(entry.id)
    if entry.status == "failed" or known is None or known.artifacts != entry.artifacts:
        return entry
    entry = entry.model_copy(update={"benchmarks": together(known.benchmarks, entry.benchmarks)})
    if not known.publications:
        return entry
    return entry.model_copy(update={"status": "published", "publications": known.publications})
