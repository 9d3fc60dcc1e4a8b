"""I1-I7 in every interleaving of some small worlds, each made for one way in which an earlier design broke."""

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.races.explorer import Choices, explore
from tests.races.world import Book, World


def fires(world: World, book: Book, times: int) -> Iterator[None]:
    for _ in range(times):
        world.fire(book)
        yield


def rewrites(world: World, cookie: int, *, valid: bool = True) -> Iterator[None]:
    world.write(cookie, valid=valid)
    yield
    world.invalidate(cookie)
    yield


def invalidates(world: World, cookie: int, times: int) -> Iterator[None]:
    for _ in range(times):
        world.invalidate(cookie)
        yield


def rewrites_then_fires(world: World, cookie: int, book: Book, *, valid: bool = True) -> Iterator[None]:
    yield from rewrites(world, cookie, valid=valid)
    world.fire(book)
    yield


def retarget(choices: Choices) -> None:
    """Events while the guest moves the interrupt."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.fire(device)
        world.run(device=fires(world, device, 1), guest=rewrites(world, 5))


def retarget_assigned(choices: Choices) -> None:
    """The same, from an assigned vector on."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.run(device=fires(world, device, 2), guest=rewrites(world, 5))


def repaired_entry(choices: Choices) -> None:
    """An invalid entry becomes valid while events come: no event after that may end as a fault."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.write(5, valid=False)
        world.invalidate(5)
        world.fire(device)
        world.run(guest=rewrites_then_fires(world, 5, device))


def broken_entry(choices: Choices) -> None:
    """A valid entry becomes invalid while events come."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.fire(device)
        world.run(guest=rewrites_then_fires(world, 5, device, valid=False))


def mask_and_unmask(choices: Choices) -> None:
    """Masked while an event is on its way, then unmasked."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.mask(book)
        yield
        world.unmask(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.run(device=fires(world, device, 1), guest=guest(world, device))


def stays_masked(choices: Choices) -> None:
    """Masked for good while events come: they stay pending."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.mask(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.run(device=fires(world, device, 2), guest=guest(world, device))


def reprogrammed(choices: Choices) -> None:
    """Another MSI, whose own entry then changes at once."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.program(book, 6)
        yield
        world.write(6)
        yield
        world.invalidate(6)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.fire(device)
        world.run(guest=guest(world, device))


def reprogrammed_assigned(choices: Choices) -> None:
    """Another MSI for a vector that the kernel serves, while events come."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.program(book, 6)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(device=fires(world, device, 2), guest=guest(world, device))


def reprogrammed_beside_its_old_entry(choices: Choices) -> None:
    """One vCPU gives the vector another MSI, another rewrites the entry of the old one."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.program(book, 6)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(one=guest(world, device), two=rewrites_then_fires(world, 5, device))


def moved_when_about_to_be_assigned(choices: Choices) -> None:
    """The route is in place and the event pending that will have the vector assigned, and the guest moves it."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.fire(device)
        world.settle()
        world.fire(device)
        world.run(guest=rewrites_then_fires(world, 5, device))


def reprogrammed_when_about_to_be_assigned(choices: Choices) -> None:
    """The same, and the guest gives it another MSI."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.program(book, 6)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.fire(device)
        world.run(guest=guest(world, device), device=fires(world, device, 1))


def stays_broken(choices: Choices) -> None:
    """Events on an entry that is invalid: a record for each that came after the last."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.write(5, valid=False)
        world.invalidate(5)
        world.run(device=fires(world, device, 3))


def gsi_reused(choices: Choices) -> None:
    """A vector goes while it is being served, and another takes its GSI."""

    def guest(world: World, old: Book) -> Iterator[None]:
        world.remove(old)
        yield
        new = world.add("w", 7)
        yield
        world.fire(new)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.run(device=fires(world, device, 1), guest=guest(world, device))


def descriptor_reused(choices: Choices) -> None:
    """The VMM closes its descriptor, and the number becomes another eventfd's."""

    def guest(world: World, book: Book) -> Iterator[None]:
        held = world.kernel.dup(book.fd)  # the device holds the eventfd too
        number, book.fd = book.fd, held
        world.kernel.close(number)
        other = world.kernel.eventfd()
        assert other == number, "the world is made for a number that is reused"
        yield
        world.write(5)
        world.invalidate(5)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(guest=guest(world, device))


def table_write_fails(choices: Choices) -> None:
    """The kernel refuses the table once, while an event is on its way."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.write(5)
        world.invalidate(5)
        world.kernel.fail_next("KVM_SET_GSI_ROUTING", errno.ENOMEM)
        world.fire(device)
        world.run(device=fires(world, device, 2))


def msi_refused(choices: Choices) -> None:
    """The kernel refuses to deliver once."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.kernel.fail_next("KVM_SIGNAL_MSI", errno.ENOMEM)
        world.fire(device)
        world.run(guest=rewrites(world, 5))


def irqfd_refused(choices: Choices) -> None:
    """The kernel refuses the irqfd once: the loop delivers by itself."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.write(5)
        world.invalidate(5)
        world.kernel.fail_next("KVM_IRQFD", errno.ENOMEM)
        world.fire(device)
        world.run(device=fires(world, device, 2))


def removed_under_fire(choices: Choices) -> None:
    """Removal of an assigned vector: its irqfd goes before its route."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.remove(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(device=fires(world, device, 2), guest=guest(world, device))


def two_vcpus(choices: Choices) -> None:
    """Two vCPUs invalidate at once."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.fire(device)
        world.run(one=rewrites(world, 5), two=invalidates(world, 5, 1))


def two_vcpus_assigned(choices: Choices) -> None:
    """Two vCPUs invalidate at once a vector that the kernel serves: neither may go on before it is deassigned."""

    def second(world: World, book: Book) -> Iterator[None]:
        world.invalidate(5)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(one=rewrites(world, 5), two=second(world, device))


def two_vectors(choices: Choices) -> None:
    """Two vectors in one batch, one of which changes."""
    with World(choices) as world:
        first, second = world.add("v", 5), world.add("w", 6)
        world.invalidate(5)
        world.invalidate(6)
        world.fire(first)
        world.fire(second)
        world.run(guest=rewrites(world, 5))


def starving(choices: Choices) -> None:
    """An invalidation at every turn: the event must still get through."""

    with World(choices) as world:
        device = world.add("v", 5)
        world.invalidate(5)
        world.fire(device)
        world.run(guest=invalidates(world, 5, 4))


def wide(world: World, cookie: int, *, answered: bool = True) -> Iterator[None]:
    world.write(cookie)
    yield
    world.invalidate_wide(cookie, answered=answered)
    yield


def wide_assigned(choices: Choices) -> None:
    """Events while the guest moves the interrupt by a wide invalidation: the irqfd stays, its route changes."""
    with World(choices) as world:
        device = world.add("v", 5)
        world.run(device=fires(world, device, 2), guest=wide(world, 5))


def wide_then_fires(choices: Choices) -> None:
    """A wide invalidation, acknowledged, then an event; on an assigned vector and on one about to be."""

    def guest(world: World, first: Book, second: Book) -> Iterator[None]:
        world.write(5)
        world.write(6)
        yield
        world.invalidate_wide(5, 6)
        yield
        world.fire(first)
        world.fire(second)
        yield

    with World(choices) as world:
        first, second = world.add("v", 5), world.add("w", 6)
        world.invalidate(6)
        world.fire(second)
        world.settle()
        world.fire(second)
        world.run(guest=guest(world, first, second))


def wide_unanswered(choices: Choices) -> None:
    """Nobody answers in time."""

    def guest(world: World, book: Book) -> Iterator[None]:
        yield from wide(world, 5, answered=False)
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(guest=guest(world, device), device=fires(world, device, 1))


def wide_answered_late(choices: Choices) -> None:
    """The answer to an invalidation that did not wait for it comes after a narrow one."""

    def guest(world: World, book: Book) -> Iterator[None]:
        late = world.invalidate_wide(5, answered=False)
        yield
        world.write(5)
        world.invalidate(5)
        yield
        world.executor.run(late)
        yield
        world.fire(book)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(guest=guest(world, device))


def wide_translation_fails(choices: Choices) -> None:
    """The entry is invalid by the time of a wide invalidation: the fault is raised at the next event."""

    def guest(world: World, book: Book) -> Iterator[None]:
        world.write(5, valid=False)
        yield
        world.invalidate_wide(5)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(guest=guest(world, device), device=fires(world, device, 1))


def wide_table_write_fails(choices: Choices) -> None:
    """The kernel refuses the one table write of a wide invalidation."""

    def guest(world: World, book: Book) -> Iterator[None]:
        yield from wide(world, 5)
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.kernel.fail_next("KVM_SET_GSI_ROUTING", errno.ENOMEM)
        world.run(guest=guest(world, device))


def wide_table_write_fails_under_another_route(choices: Choices) -> None:
    """Another thread's route for the vector comes while the write that the kernel refuses is being made."""

    def guest(world: World, book: Book) -> Iterator[None]:
        yield from wide(world, 5)
        world.fire(book)
        yield

    def other(world: World, book: Book) -> Iterator[None]:
        world.route_without_a_write(book)
        yield
        world.executor.run([])  # now it writes
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.kernel.fail_next("KVM_SET_GSI_ROUTING", errno.ENOMEM)
        world.run(guest=guest(world, device), other=other(world, device))


def two_wide(choices: Choices) -> None:
    """Two vCPUs make wide invalidations at once, each after a change of its own."""

    def vcpu(world: World, book: Book, *, fire: bool) -> Iterator[None]:
        world.write(5)
        yield
        world.invalidate_wide(5)
        yield
        if fire:
            world.fire(book)
            yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(one=vcpu(world, device, fire=False), two=vcpu(world, device, fire=True))


def wide_beside_narrow(choices: Choices) -> None:
    """One vCPU invalidates narrowly what another invalidates with many: neither may go on before it is true."""

    def second(world: World, book: Book) -> Iterator[None]:
        world.invalidate_wide(5)
        yield
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(one=rewrites(world, 5), two=second(world, device))


def wide_beside_a_new_message(choices: Choices) -> None:
    """One vCPU gives the vector another MSI, another invalidates the entry of the old one, with many."""

    def programs(world: World, book: Book) -> Iterator[None]:
        world.program(book, 6)
        yield

    def second(world: World, book: Book) -> Iterator[None]:
        yield from wide(world, 5)
        world.fire(book)
        yield

    with World(choices) as world:
        device = world.add("v", 5)
        world.run(one=programs(world, device), two=second(world, device))


def wide_while_kvm_injects(choices: Choices) -> None:
    """KVM is about to deliver, by its work queue, what was pending when the irqfd was assigned."""
    with World(choices, deferred=True) as world:
        device = world.add("v", 5)
        world.write(5)
        world.invalidate(5)
        world.fire(device)
        world.settle()
        world.fire(device)
        world.router._turn()
        world.run(guest=wide(world, 5))


WORLDS: list[Callable[[Choices], None]] = [
    retarget_assigned,
    repaired_entry,
    broken_entry,
    mask_and_unmask,
    stays_masked,
    reprogrammed,
    reprogrammed_assigned,
    reprogrammed_beside_its_old_entry,
    moved_when_about_to_be_assigned,
    reprogrammed_when_about_to_be_assigned,
    stays_broken,
    gsi_reused,
    descriptor_reused,
    table_write_fails,
    msi_refused,
    irqfd_refused,
    removed_under_fire,
    two_vectors,
    starving,
    two_vcpus_assigned,
    two_vcpus,
    retarget,
    wide_assigned,
    wide_then_fires,
    wide_unanswered,
    wide_answered_late,
    wide_translation_fails,
    wide_table_write_fails,
    wide_table_write_fails_under_another_route,
    two_wide,
    wide_beside_narrow,
    wide_beside_a_new_message,
    wide_while_kvm_injects,
]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_world_in_every_interleaving_keeps_every_invariant(world: Callable[[Choices], None]) -> None:
    report = explore(world, runs_max=60_000)
    assert report.runs > 1
