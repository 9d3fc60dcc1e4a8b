// SPDX-License-Identifier: MIT
/*
 * The agent: docs/protocol.md, the side that acts. irqrouter_agent.h is for those who use it.
 *
 * Three kinds of threads meet here. The VMM's, vCPUs mostly, say what the guest did (the verbs). The agent's own thread
 * carries out what the service decided, and serves the vectors for which a decision stands. The service, another
 * process, sees the state page.
 *
 * One lock orders them. It is handed over in the order it was asked for, and held for microseconds. The calls that wait
 * for a grace period in the kernel (deassign, table write) are made without it, and so is every wait.
 *
 *   - A deassign first changes the vector, under the lock, so that nothing decided before counts any more; then makes
 *     the ioctl. Until that has returned KVM may still inject by the old route: a verb that finds a deassign on its way
 *     makes it or waits for it, and ASSIGN is refused.
 *   - A table write is a snapshot. Writers have a lock of their own, so that KVM has the latest. A GSI that is being
 *     written counts as unknown until the write was accepted.
 *   - An invalidation renews the generation of every vector it matches. What was decided under an older one is refused
 *     with ESTALE, however late it comes.
 *
 * Sections: words and waiting; structures; the page; the life of a vector; routes; eventfds; deassigning; writing the
 * table; operations; prepared vectors; frames; requests; the connection; the agent's thread; verbs.
 */
#define _GNU_SOURCE
#include "irqrouter_agent.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian, and so must this machine be"
#endif

#define MS 1000000ll
#define SECOND (1000 * MS)
#define FOREVER INT64_MAX

#define SLOTS_MAX 4096u
/* A vector that lost this many races in a row is waited for by the next invalidation that matches it, this long. */
#define PATIENCE 3
#define STARVED_WAIT (1 * MS)
/* Ranges up to this many cookies are looked up by cookie; others walk the slots. */
#define NARROW_COOKIES 64u
/* Up to this many matches an invalidation needs no memory but its stack. */
#define STACK_ENTRIES 16u
/* ADD and MEMORY wait this long: they are not on a vCPU's path. */
#define SETUP_DEADLINE (2 * SECOND)
#define HELLO_DEADLINE (5 * SECOND)
#define BACK_OFF_MIN (10 * MS)
#define BACK_OFF_MAX SECOND
/* Replayed ADD frames that may be unanswered: descriptors in flight count against RLIMIT_NOFILE. */
#define REPLAY_WINDOW 4
#define HARVEST_MAX 256
/* Frames taken from one socket before other things get their turn. */
#define FRAMES_PER_TURN 32
/* Invalidations that follow one another within the pause are a run; the service hears of it at its end, or by then. */
#define RUN_PAUSE (200 * 1000ll)
#define RUN_MAX (2 * MS)

/* ---- words and waiting ------------------------------------------------------------------------------------------ */

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * SECOND + ts.tv_nsec;
}

/* Sleep while *word is `seen`, at most until `deadline`. May return early; the caller looks again. */
static void futex_wait(_Atomic uint32_t *word, uint32_t seen, uint32_t bits, int64_t deadline)
{
	struct timespec ts = {.tv_sec = deadline / SECOND, .tv_nsec = deadline % SECOND};

	syscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, seen, deadline == FOREVER ? NULL : &ts, NULL,
		bits);
}

static void futex_wake(_Atomic uint32_t *word, uint32_t bits)
{
	syscall(SYS_futex, word, FUTEX_WAKE_BITSET | FUTEX_PRIVATE_FLAG, INT32_MAX, NULL, NULL, bits);
}

/*
 * A lock that is handed over in the order it was asked for. With a pthread mutex the thread that carries out a batch
 * takes it again before a waiting vCPU has woken: thousands of operations overtake it, for tens of milliseconds.
 */
struct turnstile {
	_Atomic uint32_t next;
	_Atomic uint32_t serving;
};

static uint32_t turn_bit(uint32_t ticket)
{
	return 1u << (ticket % 32);
}

static void turnstile_enter(struct turnstile *turnstile)
{
	uint32_t ticket = atomic_fetch_add(&turnstile->next, 1);
	uint32_t serving;
	int spins = 0;

	while ((serving = atomic_load(&turnstile->serving)) != ticket) {
		if (spins++ < 50)
			__builtin_ia32_pause();
		else
			futex_wait(&turnstile->serving, serving, turn_bit(ticket), FOREVER);
	}
}

static bool turnstile_wanted(struct turnstile *turnstile)
{
	return atomic_load(&turnstile->next) != atomic_load_explicit(&turnstile->serving, memory_order_relaxed) + 1;
}

static void turnstile_leave(struct turnstile *turnstile)
{
	uint32_t serving = atomic_load_explicit(&turnstile->serving, memory_order_relaxed) + 1;

	/* Both sequentially consistent: either we see who waits, or who comes sees that it is its turn. */
	atomic_store(&turnstile->serving, serving);
	if (atomic_load(&turnstile->next) != serving)
		futex_wake(&turnstile->serving, turn_bit(serving));
}

/* Something that threads wait for, with the agent's lock; see wait_for(). `waiters` is under that lock. */
struct event {
	_Atomic uint32_t count;
	uint32_t waiters;
};

static void event_signal(struct event *event)
{
	atomic_fetch_add(&event->count, 1);
	if (event->waiters)
		futex_wake(&event->count, FUTEX_BITSET_MATCH_ANY);
}

/* ---- structures: the wire --------------------------------------------------------------------------------------- */

#define MAGIC 0x52515249u
#define PAGE_MAGIC 0x47515249u
#define VERSION 1
#define FRAME_MAX 65536u
#define DESCRIPTORS_MAX 240u
#define OPERATIONS_MAX 2047u
#define UNANSWERED_MAX 1024u
#define PAGE_HEADER_SIZE 4096u

enum command { HELLO = 1, MEMORY = 2, ADD = 3, INVALIDATE = 4, PING = 5, BATCH = 16, TRANSLATE = 17 };
enum { FLAG_REPLY = 1, FLAG_ERROR = 2, FLAG_MORE = 4 };
enum { FEATURE_PREPARE = 1, FEATURE_WIDE = 2 };
enum kind { SET_ROUTE = 1, CATCH = 2, CATCH_FAULT = 3, ASSIGN = 4, PREPARE = 5, MISS = 16, UPDATE = 17, FAULT = 18 };
enum { FLAG_RECORD = 1, FLAG_DELIVERING = 1, FLAG_NEW = 1 };
enum { PAGE_PREPARED = 0x10, PAGE_ROUTED = 0x20 };

struct header {
	uint16_t id;
	uint16_t command;
	uint32_t size;
	uint32_t flags;
	uint32_t error;
};

struct hello {
	uint32_t magic;
	uint16_t version_low;
	uint16_t version_high;
	uint64_t features;
	uint8_t remapper;
	uint8_t host_address_width;
	uint16_t reserved;
	uint32_t slots;
	uint64_t reserved2;
	char name[64];
};

struct welcome {
	uint16_t version;
	uint16_t reserved;
	uint32_t vectors_max;
	uint64_t features;
	uint32_t regions_max;
	uint32_t frames_per_second;
	uint64_t reserved2;
};

struct counted {
	uint32_t count;
	uint32_t reserved;
};

struct wire_region {
	uint64_t gpa;
	uint64_t size;
	uint64_t offset;
	uint32_t descriptor;
	uint32_t reserved;
};

struct added {
	uint32_t vector;
	uint32_t flags;
	uint64_t born;
};

struct scope {
	uint32_t first;
	uint32_t last;
};

struct operation {
	uint8_t kind;
	uint8_t flags;
	uint16_t reserved;
	uint32_t vector;
	uint64_t generation;
	uint64_t address; /* or the record's low quadword */
	uint32_t data;	  /* or its bits 95:64 */
	uint32_t tail;	  /* 0, or its bits 127:96 */
};

struct page_header {
	uint32_t magic;
	uint32_t slots_used;
	uint64_t table;
	uint64_t control;
};

struct page_slot {
	uint64_t generation;
	uint64_t born;
	uint64_t address;
	uint32_t data;
	uint16_t requester;
	uint8_t state;
	uint8_t refused;
	uint32_t cookie;
	uint32_t gsi;
	uint32_t invalidations;
	uint32_t caught;
	uint32_t faults;
	uint32_t stale;
	uint32_t discarded;
	uint32_t last_catch_ns;
};

_Static_assert(sizeof(struct header) == 16 && sizeof(struct hello) == 96 && sizeof(struct welcome) == 32, "wire");
_Static_assert(sizeof(struct wire_region) == 32 && sizeof(struct added) == 16, "wire");
_Static_assert(sizeof(struct operation) == 32 && sizeof(struct page_slot) == 64, "wire");

/* ---- structures: the agent -------------------------------------------------------------------------------------- */

struct message {
	uint64_t address;
	uint32_t data;
};

/* Where a vector is in its life. The first four are the page's; a REMOVED one waits to be released. */
enum { FREE, DEASSIGNED, ASSIGNED, MASKED, REMOVED, STATES };

struct vector {
	uint32_t number;
	uint32_t state;
	uint64_t born;
	uint64_t generation;
	/* Of the last SET_ROUTE, and of the route KVM has accepted: what ASSIGN may go by. */
	uint64_t routed_generation;
	uint64_t accepted_generation;
	struct message message;
	uint32_t cookie;
	uint32_t gsi;
	uint16_t requester;
	uint8_t refused;
	bool level;
	bool in_service; /* level: delivered, and no EOI yet */
	uint8_t in_service_vector;
	/* The last ASSIGN found something pending, which KVM injects from a work queue: no table write waits for it. */
	bool discarded_last;
	bool prepared;
	bool in_epoll;
	bool in_turn; /* in agent->turn */
	struct message prepared_message;
	int fd; /* our own duplicate: the number we were given may mean something else by now */
	int resample_fd;
	struct vector *next_by_cookie, **link_by_cookie;

	/*
	 * A deassign: on its way from `deassigning` being set until that is cleared, when the ioctl has returned; one
	 * that failed stays, with the error, to be tried again by the next verb that meets it. `deassign_order` counts
	 * deassigns of the whole agent, so it tells one from the next, in this slot or another.
	 */
	bool deassigning, deassign_claimed;
	int deassign_error;
	uint32_t deassign_cookie; /* the irqfd's, which may not be the vector's any more */
	uint64_t deassign_order;
	struct vector *next_deassign, **link_deassign;

	uint64_t removed_by;
	uint64_t announced; /* the number of the connection whose service knows it */
	uint32_t lost_races;
	uint32_t invalidations, caught, faults, stale, discarded, last_catch_ns;
	int64_t last_catch_at;
};

struct route {
	struct message wanted, accepted;
	bool want, have;
	bool changed;  /* in routes->changed */
	bool in_doubt; /* in a write that has not returned */
	bool foreign;  /* the VMM's own */
	struct vector *owner;
	uint32_t changed_at;
	uint32_t entry; /* in the image; only while in_image. The writers' lock. */
	bool in_image;
};

struct change {
	uint32_t gsi;
	bool want;
	struct message message;
};

struct routes {
	uint32_t first, limit;
	struct route *by_gsi;
	uint32_t *changed;
	uint32_t changed_count;
	/* The writers' lock: the table as KVM has it, and what is being written. */
	struct change *changes;
	struct kvm_irq_routing *image;
	uint32_t maybe_free; /* no GSI of ours below it is free */
};

/* A command that waits for its reply. On the stack of who waits, or from its malloc. */
struct request {
	struct request *next;
	uint16_t id;
	uint16_t command;
	bool sent;
	bool done;
	int error;
	struct operation *ops;
	uint32_t count, capacity;
	struct event replied;
};

enum connection_state { APART, GREETING, REPLAYING, READY };

/* What an id stands for; the low bits are the command. */
enum { ID_FREE = 0, ID_COMMAND = 0x3f, ID_BURNT = 0x40, ID_REPLAYED = 0x80, ID_SPENT = ID_BURNT | ID_REPLAYED };

struct connection {
	enum connection_state state;
	uint64_t number; /* of connections, from 1 */
	int request_fd, batch_fd, doorbell_fd;
	uint64_t features;
	uint32_t unanswered;
	uint16_t next_id;
	uint8_t ids[65536];
	bool broken;	   /* a send failed: the agent's thread ends it */
	bool want_out;	   /* what the agent's thread has to send found no room: it tries again soon */
	bool memory_sent;
	uint32_t outstanding; /* replayed frames without a reply */
	uint32_t replay_next;
	bool breaker_open, ping_sent;
	uint32_t batch_events;
	int64_t since;
	/* A BATCH reply that did not fit into the socket: the next BATCH is read when it has gone. */
	uint32_t reply_size;
};

/* Guest memory as last set: regions that name descriptors. */
struct memory {
	struct wire_region *regions;
	uint32_t count;
	int fds[DESCRIPTORS_MAX];
	uint32_t fd_count;
};

/* One vector that an invalidation matched. */
struct entry {
	struct vector *vector;
	uint64_t born;
	uint64_t generation; /* what this invalidation gave it */
	uint64_t order;	     /* of its deassign; 0: none */
	bool kept;	     /* left assigned, until the service has answered */
	bool certain;	     /* KVM went by `before`, and no other route was on its way */
	bool starved;
	struct message before;
};

/* Memory for an invalidation that matches many: taken from the pool, as a vCPU must not fail for want of memory. */
struct scratch {
	struct scratch *next;
	struct entry *entries;
	struct operation *ops;
};

struct irqrouter_agent {
	struct turnstile lock;
	struct turnstile writing; /* one table write at a time; taken before `lock` */
	struct turnstile memory_turn; /* one set_memory() at a time; taken before `lock` */
	int vm_fd;
	uint32_t slots, few, remapper, host_address_width;
	int64_t deadline;
	struct irqrouter_options options; /* the callbacks */
	struct sockaddr_un address;
	char name[64];

	struct vector *vectors;
	uint64_t *identities; /* eventfd-id by slot; 0: none */
	uint32_t slots_used, vector_count, level_count;
	uint32_t *free_slots; /* a ring: the one that has been free longest comes first */
	uint32_t free_first, free_count;
	struct vector **by_cookie;
	uint64_t last_generation, deassign_orders, removals;
	struct vector *deassigning, **deassigning_end;
	struct event deassigned, served, connected, scratch_returned;
	struct scratch *pool;
	struct routes routes;
	uint64_t table, control;
	struct memory memory;

	unsigned char *page;
	size_t page_size;
	struct connection connection;
	struct request *requests;
	int64_t back_off, retry_at;
	bool closing;
	bool to_ring; /* something was published that the service must look at */

	pthread_t thread;
	int epoll_fd, wake_fd, bell_fd;
	uint32_t invalidating; /* threads that are */
	int64_t run_since, run_last; /* of the invalidations that the service was not rung for yet; since 0: none */
	/* The agent's thread alone. */
	struct vector **turn;
	uint32_t turn_count;
	bool told; /* the log has it that there is no service */
	unsigned char *frame;
	unsigned char *reply;
	uint32_t *errnos;

	struct irqrouter_stats stats;
};

static void lock(struct irqrouter_agent *agent)
{
	turnstile_enter(&agent->lock);
}

static void unlock(struct irqrouter_agent *agent)
{
	turnstile_leave(&agent->lock);
}

/* Between two vectors of a long loop: let those who wait go first. */
static void give_way(struct irqrouter_agent *agent)
{
	if (turnstile_wanted(&agent->lock)) {
		unlock(agent);
		lock(agent);
	}
}

/* With the lock held, which is given up meanwhile. May return early; the caller looks again. */
static void wait_for(struct irqrouter_agent *agent, struct event *event, int64_t deadline)
{
	uint32_t seen = atomic_load(&event->count);

	event->waiters++;
	unlock(agent);
	futex_wait(&event->count, seen, FUTEX_BITSET_MATCH_ANY, deadline);
	lock(agent);
	event->waiters--;
}

static void say(struct irqrouter_agent *agent, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void say(struct irqrouter_agent *agent, const char *format, ...)
{
	char text[640];
	va_list arguments;

	if (!agent->options.log)
		return;
	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	agent->options.log(agent->options.opaque, text);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void wake_agent(struct irqrouter_agent *agent)
{
	eventfd_write(agent->wake_fd, 1);
}

/* ---- the page: what the service sees. The lock is held. Never read. --------------------------------------------- */

#define STORE(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELAXED)
#define STORE_RELEASE(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELEASE)

static size_t page_size(uint32_t slots)
{
	return PAGE_HEADER_SIZE + ((size_t)slots * sizeof(struct page_slot) + 4095) / 4096 * 4096;
}

static bool is_routed(const struct vector *vector)
{
	return vector->accepted_generation == vector->generation;
}

static bool is_there(const struct vector *vector)
{
	return vector->state != FREE && vector->state != REMOVED;
}

static uint8_t page_state(const struct vector *vector)
{
	if (!is_there(vector))
		return FREE;
	return (uint8_t)(vector->state | (vector->prepared ? PAGE_PREPARED : 0) |
			 (is_routed(vector) ? PAGE_ROUTED : 0));
}

/* Everything that a generation covers, then the generation. */
static void publish(struct irqrouter_agent *agent, const struct vector *vector)
{
	struct page_slot *slot;

	if (!agent->page)
		return;
	slot = (struct page_slot *)(agent->page + PAGE_HEADER_SIZE) + vector->number;
	STORE(slot->born, vector->born);
	STORE(slot->address, vector->message.address);
	STORE(slot->data, vector->message.data);
	STORE(slot->requester, vector->requester);
	STORE(slot->state, page_state(vector));
	STORE(slot->refused, vector->refused);
	STORE(slot->cookie, vector->cookie);
	STORE(slot->gsi, vector->gsi);
	STORE(slot->invalidations, vector->invalidations);
	STORE(slot->caught, vector->caught);
	STORE(slot->faults, vector->faults);
	STORE(slot->stale, vector->stale);
	STORE(slot->discarded, vector->discarded);
	STORE(slot->last_catch_ns, vector->last_catch_ns);
	STORE_RELEASE(slot->generation, vector->generation);
}

static void publish_header(struct irqrouter_agent *agent)
{
	struct page_header *header = (struct page_header *)agent->page;

	if (!agent->page)
		return;
	STORE(header->magic, PAGE_MAGIC);
	STORE(header->table, agent->table);
	STORE(header->control, agent->control);
	STORE_RELEASE(header->slots_used, agent->slots_used);
}

/* Has the service look at the page. Never waits: a doorbell whose count is full is rung. */
static void ring(struct irqrouter_agent *agent)
{
	if (agent->connection.doorbell_fd >= 0)
		eventfd_write(agent->connection.doorbell_fd, 1);
}

static void ring_if_due(struct irqrouter_agent *agent)
{
	if (agent->to_ring)
		ring(agent);
	agent->to_ring = false;
}

static void set_bell(struct irqrouter_agent *agent, int64_t at)
{
	struct itimerspec timer = {.it_value = {.tv_sec = at / SECOND, .tv_nsec = at % SECOND}};

	timerfd_settime(agent->bell_fd, TFD_TIMER_ABSTIME, &timer, NULL);
}

/*
 * The doorbell of an invalidation that took few irqfds away. Guests make them in runs (a device's queues move to other
 * CPUs one by one), and each deassign needs a CPU for KVM's grace period and work queues: a service that wakes at the
 * first takes it from the rest, and the vCPU waits for that. So the agent's thread rings when the run is over.
 */
static void ring_after_run(struct irqrouter_agent *agent)
{
	int64_t now = now_ns();

	if (agent->connection.doorbell_fd < 0)
		return;
	agent->run_last = now;
	if (agent->run_since)
		return; /* end_run() looks again: to set a timer costs more than everything else here */
	agent->run_since = now;
	set_bell(agent, now + RUN_PAUSE);
}

/* The agent's thread: ring, unless the run has gone on meanwhile. */
static void end_run(struct irqrouter_agent *agent)
{
	uint64_t expirations;
	int64_t end;

	lock(agent);
	if (read(agent->bell_fd, &expirations, sizeof(expirations)) > 0 && agent->run_since) {
		end = (agent->invalidating ? now_ns() : agent->run_last) + RUN_PAUSE;
		if (end > agent->run_since + RUN_MAX)
			end = agent->run_since + RUN_MAX;
		if (end > now_ns()) {
			set_bell(agent, end);
		} else {
			agent->run_since = 0;
			ring(agent);
		}
	}
	unlock(agent);
}

/* ---- the life of a vector --------------------------------------------------------------------------------------- */

enum happening {
	INVALIDATED,
	WIDENED,      /* the same, by an invalidation of many that has not ended: what is assigned may get a route */
	ROUTE_MISSED, /* and got none until it ended */
	GOT_MASKED,
	UNMASKED,
	PROGRAMMED,
	GOT_REMOVED,
	ROUTE_REFUSED,
	GOT_ASSIGNED,
	HAPPENINGS
};

struct row {
	uint8_t next; /* 0: cannot happen */
	bool renews;
	bool deassigns;
};

/* Nothing else changes a vector's state, but its creation and release. */
static const struct row table[STATES][HAPPENINGS] = {
	[ASSIGNED] = {
		[INVALIDATED] = {DEASSIGNED, true, true},
		[WIDENED] = {ASSIGNED, true, false},
		[ROUTE_MISSED] = {DEASSIGNED, false, true}, /* renewed before: what was decided since is good */
		[GOT_MASKED] = {MASKED, true, true},
		[UNMASKED] = {ASSIGNED, false, false}, /* guests write the mask bit twice */
		[PROGRAMMED] = {DEASSIGNED, true, true},
		[GOT_REMOVED] = {REMOVED, true, true},
		[ROUTE_REFUSED] = {DEASSIGNED, true, true},
	},
	[DEASSIGNED] = {
		[INVALIDATED] = {DEASSIGNED, true, false},
		[WIDENED] = {DEASSIGNED, true, false},
		[GOT_MASKED] = {MASKED, true, false},
		[UNMASKED] = {DEASSIGNED, false, false},
		[PROGRAMMED] = {DEASSIGNED, true, false},
		[GOT_REMOVED] = {REMOVED, true, false},
		[ROUTE_REFUSED] = {DEASSIGNED, false, false},
		[GOT_ASSIGNED] = {ASSIGNED, false, false},
	},
	[MASKED] = {
		[INVALIDATED] = {MASKED, true, false},
		[WIDENED] = {MASKED, true, false},
		[GOT_MASKED] = {MASKED, false, false},
		[UNMASKED] = {DEASSIGNED, true, false},
		[PROGRAMMED] = {MASKED, true, false},
		[GOT_REMOVED] = {REMOVED, true, false},
		[ROUTE_REFUSED] = {MASKED, false, false},
	},
};

static void begin_deassign(struct irqrouter_agent *agent, struct vector *vector, uint32_t cookie)
{
	vector->deassign_claimed = false;
	vector->deassign_error = 0;
	vector->deassign_cookie = cookie;
	vector->deassign_order = ++agent->deassign_orders;
	if (vector->deassigning)
		return; /* cannot be: an irqfd is assigned only when none is on its way */
	vector->deassigning = true;
	vector->next_deassign = NULL;
	vector->link_deassign = agent->deassigning_end;
	*agent->deassigning_end = vector;
	agent->deassigning_end = &vector->next_deassign;
}

static void end_deassign(struct irqrouter_agent *agent, struct vector *vector)
{
	if (!vector->deassigning)
		return;
	vector->deassigning = false;
	*vector->link_deassign = vector->next_deassign;
	if (vector->next_deassign)
		vector->next_deassign->link_deassign = vector->link_deassign;
	else
		agent->deassigning_end = vector->link_deassign;
}

/* The vector's deassign that has not returned yet: its order, or 0. One that failed begins anew. */
static uint64_t on_its_way(struct vector *vector)
{
	if (!vector->deassigning)
		return 0;
	if (vector->deassign_error) {
		vector->deassign_error = 0;
		vector->deassign_claimed = false;
	}
	return vector->deassign_order;
}

/*
 * Move the vector; with the lock held. True once what is returned, the order of a deassign, went through
 * finish_deassign(). `cookie` is that of the irqfd it may have.
 */
static uint64_t happen(struct irqrouter_agent *agent, struct vector *vector, enum happening what, uint32_t cookie)
{
	const struct row *row = &table[vector->state][what];

	if (row->next == FREE)
		return on_its_way(vector);
	vector->state = row->next;
	if (row->renews) {
		vector->generation = ++agent->last_generation;
		vector->refused = 0;
		vector->prepared = false;
	}
	if (row->deassigns)
		begin_deassign(agent, vector, cookie);
	publish(agent, vector);
	return on_its_way(vector);
}

static struct vector *find(struct irqrouter_agent *agent, uint32_t number)
{
	struct vector *vector = number < agent->slots_used ? &agent->vectors[number] : NULL;

	return vector && is_there(vector) ? vector : NULL;
}

static struct vector *known(struct irqrouter_agent *agent, const struct irqrouter_vector *handle)
{
	struct vector *vector = find(agent, handle->number);

	return vector && vector->born == handle->born ? vector : NULL;
}

static void join_cookie(struct irqrouter_agent *agent, struct vector *vector)
{
	struct vector **head = &agent->by_cookie[vector->cookie];

	vector->next_by_cookie = *head;
	vector->link_by_cookie = head;
	if (*head)
		(*head)->link_by_cookie = &vector->next_by_cookie;
	*head = vector;
}

static void leave_cookie(struct vector *vector)
{
	*vector->link_by_cookie = vector->next_by_cookie;
	if (vector->next_by_cookie)
		vector->next_by_cookie->link_by_cookie = vector->link_by_cookie;
}

/* The index of the IRTE that a message uses (Intel VT-d specification, 5.1.3); UNINDEXED where it can use none. */
static uint32_t vtd_cookie(const struct message *message)
{
	uint64_t address = message->address;
	uint64_t index;

	if (address >> 20 != 0xfee || !(address & 0x10))
		return IRQROUTER_UNINDEXED;
	index = (address >> 5 & 0x7fff) | (address & 4) << 13;
	if (address & 8)
		index += message->data;
	return index < IRQROUTER_UNINDEXED ? (uint32_t)index : IRQROUTER_UNINDEXED;
}

/* The agent computes it itself: an invalidation that comes before the service has spoken must find the vector. */
static uint32_t cookie_of(const struct irqrouter_agent *agent, const struct message *message, uint16_t requester,
			  uint32_t given)
{
	switch (agent->remapper) {
	case IRQROUTER_REMAPPER_VTD:
		return vtd_cookie(message);
	case IRQROUTER_REMAPPER_AMDVI:
		return requester;
	case IRQROUTER_REMAPPER_VMM:
		return given;
	default:
		return IRQROUTER_UNINDEXED;
	}
}

/* ---- routes: what is wanted, what KVM accepted, and the difference. The lock is held. --------------------------- */

static bool same(const struct message *a, const struct message *b)
{
	return a->address == b->address && a->data == b->data;
}

/* Keeps the list of changes. True when KVM has what is wanted. */
static bool compare_route(struct routes *routes, uint32_t gsi)
{
	struct route *route = &routes->by_gsi[gsi];
	bool has = !route->in_doubt && route->want == route->have &&
		   (!route->want || same(&route->wanted, &route->accepted));

	if (has && route->changed) {
		uint32_t last = routes->changed[--routes->changed_count];

		routes->changed[route->changed_at] = last;
		routes->by_gsi[last].changed_at = route->changed_at;
		route->changed = false;
	} else if (!has && !route->changed) {
		route->changed = true;
		route->changed_at = routes->changed_count;
		routes->changed[routes->changed_count++] = gsi;
	}
	return has;
}

static bool want_route(struct routes *routes, uint32_t gsi, const struct message *message)
{
	routes->by_gsi[gsi].want = true;
	routes->by_gsi[gsi].wanted = *message;
	return compare_route(routes, gsi);
}

static void drop_route(struct routes *routes, uint32_t gsi)
{
	routes->by_gsi[gsi].want = false;
	compare_route(routes, gsi);
}

/* The lowest that is free, so that the table stays dense. */
static int allocate_gsi(struct routes *routes, struct vector *owner)
{
	uint32_t gsi;

	for (gsi = routes->maybe_free; gsi < routes->limit; gsi++) {
		struct route *route = &routes->by_gsi[gsi];

		if (!route->owner && !route->foreign) {
			route->owner = owner;
			owner->gsi = gsi;
			routes->maybe_free = gsi + 1;
			return 0;
		}
	}
	return -ENOSPC;
}

static void free_gsi(struct routes *routes, uint32_t gsi)
{
	routes->by_gsi[gsi].owner = NULL;
	if (gsi < routes->maybe_free)
		routes->maybe_free = gsi;
}

/*
 * KVM injects at once through a route to one local APIC. Others may be deferred to a work queue, for which a table
 * write does not wait: only deassigning does. A guess on the safe side, as 255 is no broadcast for an x2APIC.
 */
static bool single_destination(const struct message *message)
{
	uint32_t destination = (uint32_t)(message->address >> 12 & 0xff) | (uint32_t)(message->address >> 32 & ~0xffu);
	uint32_t delivery_mode = message->data >> 8 & 7;

	return !(message->address & 4) && delivery_mode <= 1 && destination != 0xff && destination != UINT32_MAX;
}

/* ---- eventfds --------------------------------------------------------------------------------------------------- */

/* Take the whole count; 0 when there is none. */
static uint64_t take(int fd)
{
	uint64_t count = 0;
	struct iovec iov = {&count, sizeof(count)};

	/* RWF_NOWAIT: O_NONBLOCK is the open file's, and somebody else who holds it may have cleared it. */
	return preadv2(fd, &iov, 1, -1, RWF_NOWAIT) == sizeof(count) ? count : 0;
}

static bool is_pending(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	return poll(&polled, 1, 0) == 1 && polled.revents & POLLIN;
}

/* A line "name: value" of fdinfo; its number, or `missing`. */
static uint64_t fdinfo_value(const char *info, const char *name, int base, uint64_t missing)
{
	const char *line = strstr(info, name);

	if (!line || (line != info && line[-1] != '\n'))
		return missing;
	return strtoull(line + strlen(name), NULL, base);
}

static int read_fdinfo(int fd, char *info, size_t size)
{
	char path[48];
	ssize_t length;
	int info_fd;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (info_fd < 0)
		return -errno;
	length = read(info_fd, info, size - 1);
	close(info_fd);
	if (length < 0)
		return -EIO;
	info[length] = 0;
	return 0;
}

/* A duplicate of an eventfd, and who it is; checked by the duplicate, as the number may be reused at any time. */
static int adopt_eventfd(int given, int *out, uint64_t *identity)
{
	const uint64_t missing = UINT64_MAX;
	char info[1024];
	int error;
	int fd = fcntl(given, F_DUPFD_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	error = read_fdinfo(fd, info, sizeof(info));
	if (error)
		goto refuse;
	error = -EINVAL;
	if (!strstr(info, "eventfd-count:"))
		goto refuse;
	*identity = fdinfo_value(info, "eventfd-id:", 10, missing);
	if (*identity == missing || fdinfo_value(info, "eventfd-semaphore:", 10, missing) == missing) {
		error = -ENOSYS;
		goto refuse;
	}
	if (fdinfo_value(info, "eventfd-semaphore:", 10, missing) || !(fdinfo_value(info, "flags:", 8, 0) & O_NONBLOCK))
		goto refuse;
	++*identity; /* 0 is for "none" */
	*out = fd;
	return 0;
refuse:
	close(fd);
	return error;
}

/* Watch for one event. The lock is held, so the descriptor is not closed meanwhile. */
static int arm(struct irqrouter_agent *agent, struct vector *vector)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = vector->number};

	if (epoll_ctl(agent->epoll_fd, vector->in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, vector->fd, &event))
		return -errno;
	vector->in_epoll = true;
	return 0;
}

/* Leaving the epoll set comes before close: the set holds the file, which others have open, and not the number. */
static void close_eventfd(struct irqrouter_agent *agent, struct vector *vector)
{
	if (vector->in_epoll)
		epoll_ctl(agent->epoll_fd, EPOLL_CTL_DEL, vector->fd, NULL);
	vector->in_epoll = false;
	close_fd(&vector->fd);
	close_fd(&vector->resample_fd);
}

/* ---- deassigning ------------------------------------------------------------------------------------------------ */

static int kvm_irqfd(struct irqrouter_agent *agent, int fd, uint32_t gsi, uint32_t flags)
{
	struct kvm_irqfd irqfd = {.fd = (uint32_t)fd, .gsi = gsi, .flags = flags};

	return ioctl(agent->vm_fd, KVM_IRQFD, &irqfd) < 0 ? -errno : 0;
}

/* Make the ioctl. The lock is given up meanwhile; the vector stays, since whoever releases it waits for this. */
static void make_deassign(struct irqrouter_agent *agent, struct vector *vector)
{
	int fd = vector->fd, error;
	uint32_t gsi = vector->gsi;

	vector->deassign_claimed = true;
	agent->stats.deassigns++;
	unlock(agent);
	error = kvm_irqfd(agent, fd, gsi, KVM_IRQFD_FLAG_DEASSIGN);
	lock(agent);
	vector->deassign_error = error;
	if (!error)
		end_deassign(agent, vector);
	event_signal(&agent->deassigned);
}

/*
 * With the lock held, which is given up meanwhile: make the deassign that was begun as number `order`, or wait for
 * whoever is making it. No timeout is possible: KVM waits for a grace period in it, and for a work queue of the host.
 */
static int finish_deassign(struct irqrouter_agent *agent, struct vector *vector, uint64_t order)
{
	while (vector->deassigning && vector->deassign_order == order && !vector->deassign_error) {
		if (vector->deassign_claimed)
			wait_for(agent, &agent->deassigned, FOREVER);
		else
			make_deassign(agent, vector);
	}
	return vector->deassigning && vector->deassign_order == order ? vector->deassign_error : 0;
}

static bool is_in(const struct scope *scope, uint32_t cookie)
{
	return cookie >= scope->first && cookie <= scope->last;
}

/* What failed to be deassigned before is tried again. */
static void begin_deassigns_anew(struct irqrouter_agent *agent, const struct scope *scope)
{
	struct vector *vector;

	for (vector = agent->deassigning; vector; vector = vector->next_deassign) {
		if (is_in(scope, vector->deassign_cookie))
			on_its_way(vector);
	}
}

/* Those begun so far whose irqfd had a cookie in the range: vectors that were removed, or have another by now. */
static int finish_deassigns_of(struct irqrouter_agent *agent, const struct scope *scope)
{
	struct vector *vector = agent->deassigning;
	uint64_t limit = agent->deassign_orders;
	int failure = 0;

	while (vector) {
		bool ours = vector->deassign_order <= limit && is_in(scope, vector->deassign_cookie);

		if (ours && !vector->deassign_error) {
			finish_deassign(agent, vector, vector->deassign_order);
			vector = agent->deassigning; /* the list has changed; what failed is marked */
			continue;
		}
		if (ours)
			failure = vector->deassign_error;
		vector = vector->next_deassign;
	}
	return failure;
}

/* ---- writing the table ------------------------------------------------------------------------------------------ */

/* The order of entries means nothing to KVM: a dropped one is filled by the last. */
static void edit_image(struct routes *routes, uint32_t gsi, const struct message *message)
{
	struct kvm_irq_routing *image = routes->image;
	struct route *route = &routes->by_gsi[gsi];

	if (!message) {
		if (route->in_image) {
			image->entries[route->entry] = image->entries[--image->nr];
			routes->by_gsi[image->entries[route->entry].gsi].entry = route->entry;
			route->in_image = false;
		}
		return;
	}
	if (!route->in_image) {
		route->in_image = true;
		route->entry = image->nr++;
	}
	image->entries[route->entry] = (struct kvm_irq_routing_entry){
		.gsi = gsi,
		.type = KVM_IRQ_ROUTING_MSI,
		.u.msi = {.address_lo = (uint32_t)message->address,
			  .address_hi = (uint32_t)(message->address >> 32),
			  .data = message->data},
	};
}

static uint32_t begin_write(struct irqrouter_agent *agent)
{
	struct routes *routes = &agent->routes;
	uint32_t count;

	/* What is in doubt stays in the list, so giving way reorders only what we have not come to. */
	for (count = 0; count < routes->changed_count; count++) {
		uint32_t gsi = routes->changed[count];
		struct route *route = &routes->by_gsi[gsi];

		route->in_doubt = true;
		routes->changes[count] = (struct change){gsi, route->want, route->wanted};
		give_way(agent);
	}
	return count;
}

static void accept_write(struct irqrouter_agent *agent, uint32_t count)
{
	struct routes *routes = &agent->routes;
	uint32_t i;

	for (i = 0; i < count; i++) {
		const struct change *change = &routes->changes[i];
		struct route *route = &routes->by_gsi[change->gsi];
		struct vector *owner = route->owner;

		route->in_doubt = false;
		route->have = change->want;
		route->accepted = change->message;
		/* Otherwise it was given another route during the write, which the next one brings. */
		if (compare_route(routes, change->gsi) && owner && route->want) {
			owner->accepted_generation = owner->routed_generation;
			publish(agent, owner);
		}
		give_way(agent);
	}
}

static bool is_passing(int error)
{
	return error == ENOMEM || error == EAGAIN || error == EINTR;
}

/*
 * KVM refused the table, so the old routes are live: forget those that were to be set (one that stayed would make every
 * later write fail, whoever's it was) and deassign their vectors. Drops stay wanted.
 */
static void refuse_route(struct irqrouter_agent *agent, const struct change *change, int error)
{
	struct routes *routes = &agent->routes;
	struct route *route = &routes->by_gsi[change->gsi];
	bool refused = change->want && route->want && same(&route->wanted, &change->message);

	route->in_doubt = false;
	if (refused) {
		route->want = route->have;
		route->wanted = route->accepted;
	}
	compare_route(routes, change->gsi);
	if (!refused || !route->owner || route->owner->state == REMOVED)
		return;
	happen(agent, route->owner, ROUTE_REFUSED, route->owner->cookie);
	if (route->owner->prepared || !is_passing(error))
		route->owner->refused = (uint8_t)error;
	route->owner->prepared = false;
	publish(agent, route->owner);
}

static int refuse_write(struct irqrouter_agent *agent, uint32_t count, int error)
{
	struct routes *routes = &agent->routes;
	int failure = 0, result;
	uint32_t i;

	for (i = 0; i < count; i++) {
		const struct change *change = &routes->changes[i];
		const struct route *route = &routes->by_gsi[change->gsi];

		edit_image(routes, change->gsi, route->have ? &route->accepted : NULL);
	}
	for (i = 0; i < count; i++) {
		refuse_route(agent, &routes->changes[i], error);
		give_way(agent);
	}
	ring(agent);
	for (i = 0; i < count; i++) {
		struct vector *owner = routes->by_gsi[routes->changes[i].gsi].owner;

		if (owner && owner->deassigning) {
			result = finish_deassign(agent, owner, owner->deassign_order);
			failure = result ? result : failure;
		}
	}
	return failure ? failure : -error;
}

/* The writers' lock is held. `have` and `accepted` of a route change only under both locks. */
static int write_changes(struct irqrouter_agent *agent)
{
	struct routes *routes = &agent->routes;
	uint32_t i, count;
	int error;

	lock(agent);
	count = begin_write(agent);
	agent->stats.table_writes += count > 0;
	unlock(agent);
	if (!count)
		return 0;
	for (i = 0; i < count; i++) {
		const struct change *change = &routes->changes[i];

		edit_image(routes, change->gsi, change->want ? &change->message : NULL);
	}
	error = ioctl(agent->vm_fd, KVM_SET_GSI_ROUTING, routes->image) < 0 ? errno : 0;
	lock(agent);
	if (error)
		error = refuse_write(agent, count, error);
	else
		accept_write(agent, count);
	unlock(agent);
	return error;
}

/*
 * Write the table if it differs from what KVM accepted; 0 or -errno. Without the lock: the write waits for a grace
 * period, a millisecond or more where there are thousands of routes. Nothing depends on the table meanwhile: an irqfd
 * is assigned after its route was accepted, and deassigned before its route is dropped.
 */
static int write_routes(struct irqrouter_agent *agent)
{
	bool changed;
	int error;

	lock(agent);
	changed = agent->routes.changed_count; /* 0: nobody is writing either, as what is in doubt is in the list */
	unlock(agent);
	if (!changed)
		return 0;
	turnstile_enter(&agent->writing);
	error = write_changes(agent);
	turnstile_leave(&agent->writing);
	return error;
}

/* ---- operations: one each, with the lock held; 0 or an errno, as it goes over the wire -------------------------- */

static struct message message_of(const struct operation *op)
{
	return (struct message){op->address, op->data};
}

/* Delivered now. KVM answers 0 when no local APIC took it, and -1 before the first vCPU: delivered, as in hardware. */
static int signal_msi(struct irqrouter_agent *agent, const struct message *message)
{
	struct kvm_msi msi = {
		.address_lo = (uint32_t)message->address,
		.address_hi = (uint32_t)(message->address >> 32),
		.data = message->data,
	};

	return ioctl(agent->vm_fd, KVM_SIGNAL_MSI, &msi) < 0 && errno != EPERM ? errno : 0;
}

/* Whoever waits for a vector that kept losing the race learns that it did not. */
static void was_served(struct irqrouter_agent *agent, struct vector *vector)
{
	vector->lost_races = 0;
	event_signal(&agent->served);
}

/* Reading and delivering are one operation: between two, an invalidation or the service's death loses the event. */
static int do_catch(struct irqrouter_agent *agent, struct vector *vector, const struct message *message)
{
	int error;

	if (vector->in_service)
		return EBUSY;
	if (!take(vector->fd))
		return EAGAIN;
	error = signal_msi(agent, message);
	if (error) {
		eventfd_write(vector->fd, 1); /* what had gathered is one event; a full count could not be written */
		return error;
	}
	vector->last_catch_at = now_ns();
	vector->caught++;
	vector->in_service = vector->level;
	vector->in_service_vector = message->data & 0xff;
	was_served(agent, vector);
	return 0;
}

static void record(struct irqrouter_agent *agent, const struct vector *vector, const struct operation *op)
{
	struct irqrouter_vector handle = {vector->number, vector->born};

	if (op->flags & FLAG_RECORD && agent->options.on_fault)
		agent->options.on_fault(agent->options.opaque, &handle, op->address,
					(uint64_t)op->tail << 32 | op->data);
}

/* Recorded first, consumed second: who dies between the two has recorded once too often, and lost nothing. */
static int do_catch_fault(struct irqrouter_agent *agent, struct vector *vector, const struct operation *op)
{
	if (vector->in_service)
		return EBUSY;
	if (!is_pending(vector->fd))
		return EAGAIN;
	record(agent, vector, op);
	if (take(vector->fd) > 1)
		record(agent, vector, op); /* one may have come after the record, and this took it too */
	vector->faults++;
	was_served(agent, vector);
	return 0;
}

static int do_set_route(struct irqrouter_agent *agent, struct vector *vector, const struct message *message)
{
	bool has = want_route(&agent->routes, vector->gsi, message);

	vector->routed_generation = vector->generation;
	vector->accepted_generation = has ? vector->generation : 0;
	return 0;
}

/* KVM does not take it: the service must know. */
static void refuse(struct irqrouter_agent *agent, struct vector *vector, int error)
{
	vector->refused = (uint8_t)error;
	publish(agent, vector);
	ring(agent);
}

static int do_assign(struct irqrouter_agent *agent, struct vector *vector, bool delivering)
{
	int error;

	if (vector->level)
		return EOPNOTSUPP;
	if (vector->deassigning)
		return EINPROGRESS;
	if (delivering && !is_pending(vector->fd))
		return EAGAIN;
	error = -kvm_irqfd(agent, vector->fd, vector->gsi, 0);
	if (error) {
		/* EBUSY: somebody else's irqfd. What is pending was not injected and must not be discarded. */
		refuse(agent, vector, error);
		return error;
	}
	agent->stats.assigns++;
	happen(agent, vector, GOT_ASSIGNED, vector->cookie);
	/* KVM injected what was pending, and left it there. */
	vector->discarded_last = take(vector->fd) > 0;
	vector->discarded += vector->discarded_last;
	if (vector->discarded_last)
		was_served(agent, vector);
	return 0;
}

static int do_prepare(struct irqrouter_agent *agent, struct vector *vector, const struct operation *op, int64_t woken);

static int refusal(const struct vector *vector, const struct operation *op)
{
	if (op->generation != vector->generation || vector->state == MASKED)
		return ESTALE;
	if (op->kind == SET_ROUTE)
		return 0;
	if (vector->state != DEASSIGNED)
		return EALREADY;
	return op->kind == ASSIGN && !is_routed(vector) ? ENXIO : 0;
}

static int came_late(struct vector *vector, const struct operation *op)
{
	bool serving = op->kind == CATCH || op->kind == CATCH_FAULT || op->kind == PREPARE;

	vector->stale++;
	if (serving && vector->state == DEASSIGNED && is_pending(vector->fd))
		vector->lost_races++;
	return ESTALE;
}

static int carry_out(struct irqrouter_agent *agent, struct vector *vector, const struct operation *op, int64_t woken)
{
	struct message message = message_of(op);

	switch (op->kind) {
	case SET_ROUTE:
		return do_set_route(agent, vector, &message);
	case CATCH:
		return do_catch(agent, vector, &message);
	case CATCH_FAULT:
		return do_catch_fault(agent, vector, op);
	case ASSIGN:
		return do_assign(agent, vector, op->flags & FLAG_DELIVERING);
	default:
		return do_prepare(agent, vector, op, woken);
	}
}

static int run_one(struct irqrouter_agent *agent, const struct operation *op, int64_t woken)
{
	struct vector *vector = find(agent, op->vector);
	int error;

	if (!vector)
		return ESTALE;
	error = refusal(vector, op);
	if (error == ESTALE)
		error = came_late(vector, op);
	else if (!error)
		error = carry_out(agent, vector, op, woken);
	publish(agent, vector);
	return error;
}

/* Whether an ASSIGN needs the table written first. The lock is held. */
static bool needs_write(struct irqrouter_agent *agent, const struct operation *op)
{
	struct vector *vector = find(agent, op->vector);

	return op->kind == ASSIGN && vector && vector->state == DEASSIGNED && op->generation == vector->generation &&
	       vector->routed_generation == vector->generation && !is_routed(vector);
}

/* A run of operations: what is remembered of each vector. */
enum { UNTOUCHED, FAILED, PUT_OFF };
#define NOT_YET UINT32_MAX

static uint8_t *mark_of(uint8_t *marks, const struct operation *op)
{
	return &marks[op->vector < SLOTS_MAX ? op->vector : SLOTS_MAX]; /* the last is for numbers that no vector has */
}

static uint32_t run_marked(struct irqrouter_agent *agent, const struct operation *op, uint8_t *mark, int refused,
			   int64_t woken)
{
	uint32_t error;

	if (*mark == FAILED)
		return ECANCELED;
	lock(agent);
	error = (uint32_t)run_one(agent, op, woken);
	if (error == ENXIO) { /* the table was refused: in this run, or in another thread's write that took it along */
		struct vector *vector = find(agent, op->vector);

		if (refused)
			error = (uint32_t)-refused;
		else if (vector && vector->refused)
			error = vector->refused;
	}
	unlock(agent);
	if (error && op->vector < SLOTS_MAX)
		*mark = FAILED;
	return error;
}

/*
 * In order, but an ASSIGN that needs the table comes after all that needs none, and takes its vector's later operations
 * with it: so one write is enough.
 */
static void run_first(struct irqrouter_agent *agent, const struct operation *ops, uint32_t count, uint32_t *errnos,
		      uint8_t *marks, int64_t woken)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		uint8_t *mark = mark_of(marks, &ops[i]);

		if (*mark == UNTOUCHED && ops[i].kind == ASSIGN) {
			lock(agent);
			if (needs_write(agent, &ops[i]))
				*mark = PUT_OFF;
			unlock(agent);
		}
		errnos[i] = *mark == PUT_OFF ? NOT_YET : run_marked(agent, &ops[i], mark, 0, woken);
	}
}

static int run_put_off(struct irqrouter_agent *agent, const struct operation *ops, uint32_t count, uint32_t *errnos,
		       uint8_t *marks, int refused, int64_t woken)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		uint8_t *mark = mark_of(marks, &ops[i]);
		int error = 0;

		if (errnos[i] != NOT_YET)
			continue;
		if (ops[i].kind == ASSIGN && *mark != FAILED)
			error = write_routes(agent); /* nothing to do, unless its vector was routed again meanwhile */
		refused = error ? error : refused;
		errnos[i] = run_marked(agent, &ops[i], mark, refused, woken);
	}
	return refused;
}

/* The errno of a refused write goes to the operations whose routes fell with it. */
static void blame(struct irqrouter_agent *agent, const struct operation *ops, uint32_t count, uint32_t *errnos,
		  int refused)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		struct vector *vector;
		bool fell;

		if (errnos[i])
			continue;
		lock(agent);
		vector = find(agent, ops[i].vector);
		fell = !vector || vector->accepted_generation != ops[i].generation;
		if (ops[i].kind == SET_ROUTE ? fell : ops[i].kind == PREPARE && vector && fell && !vector->prepared)
			errnos[i] = (uint32_t)-refused;
		unlock(agent);
	}
}

/* Carry out what was decided; one errno each. One that fails cancels the rest of that vector's, not others'. */
static void run(struct irqrouter_agent *agent, const struct operation *ops, uint32_t count, uint32_t *errnos,
		int64_t woken)
{
	uint8_t marks[SLOTS_MAX + 1] = {0};
	int refused, error;

	run_first(agent, ops, count, errnos, marks, woken);
	refused = write_routes(agent);
	refused = run_put_off(agent, ops, count, errnos, marks, refused, woken);
	error = write_routes(agent);
	refused = error ? error : refused;
	if (refused)
		blame(agent, ops, count, errnos, refused);
}

/* ---- prepared vectors. The agent's thread; the lock is held. ---------------------------------------------------- */

static void fail_prepared(struct irqrouter_agent *agent, struct vector *vector, int error)
{
	vector->prepared = false;
	refuse(agent, vector, error);
}

/* Armed again at the end of the turn, after the table was written. */
static void arm_later(struct irqrouter_agent *agent, struct vector *vector)
{
	if (!vector->in_turn) {
		vector->in_turn = true;
		agent->turn[agent->turn_count++] = vector;
	}
}

/* The next event of a prepared vector, if there is one: assign if that is possible, else catch and then route. */
static int attend(struct irqrouter_agent *agent, struct vector *vector, int64_t woken)
{
	int64_t took;
	int error;

	if (is_routed(vector) && !vector->refused && !vector->deassigning && !vector->level)
		return do_assign(agent, vector, true);
	error = do_catch(agent, vector, &vector->prepared_message);
	if (error)
		return error;
	took = vector->last_catch_at - woken;
	vector->last_catch_ns = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
	if (!vector->refused && !vector->level)
		do_set_route(agent, vector, &vector->prepared_message);
	return 0;
}

static int serve(struct irqrouter_agent *agent, struct vector *vector, int64_t woken)
{
	int error = attend(agent, vector, woken);

	/* EBUSY: in service; or somebody else's irqfd, then events are caught from now on. */
	if (error && error != EAGAIN && !(error == EBUSY && vector->in_service)) {
		fail_prepared(agent, vector, error);
		return error;
	}
	if (vector->state == DEASSIGNED && !vector->in_service)
		arm_later(agent, vector);
	return 0;
}

static int do_prepare(struct irqrouter_agent *agent, struct vector *vector, const struct operation *op, int64_t woken)
{
	vector->prepared = true;
	vector->prepared_message = message_of(op);
	return serve(agent, vector, woken);
}

static void fired(struct irqrouter_agent *agent, uint32_t number, int64_t woken)
{
	struct vector *vector;

	lock(agent);
	vector = find(agent, number);
	agent->stats.wakeups++;
	/* Otherwise it was armed for a decision that stands no more: the service watches it, or nobody does. */
	if (vector && vector->prepared && vector->state == DEASSIGNED) {
		serve(agent, vector, woken);
		publish(agent, vector);
	}
	unlock(agent);
}

static void settle_one(struct irqrouter_agent *agent, struct vector *vector)
{
	int error;

	vector->in_turn = false;
	if (!vector->prepared || vector->state != DEASSIGNED)
		return;
	error = arm(agent, vector);
	if (error)
		fail_prepared(agent, vector, -error);
}

/* The end of a turn: one table write for all that was caught, then they are watched again. */
static void settle(struct irqrouter_agent *agent)
{
	uint32_t i;

	if (!agent->turn_count)
		return;
	write_routes(agent); /* if it is refused, refuse_route() tells those whose routes those were */
	lock(agent);
	for (i = 0; i < agent->turn_count; i++) {
		settle_one(agent, agent->turn[i]);
		give_way(agent);
	}
	agent->turn_count = 0;
	unlock(agent);
}

/* ---- frames ----------------------------------------------------------------------------------------------------- */

/* Never waits; 0 or -errno. `fds` may be NULL. */
static int send_frame(int fd, const struct header *header, const void *payload, const int *fds, uint32_t fd_count)
{
	union {
		char bytes[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov[2] = {
		{(void *)header, sizeof(*header)},
		{(void *)payload, header->size - sizeof(*header)},
	};
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};

	if (fd_count) {
		struct cmsghdr *cmsg;

		memset(&control, 0, sizeof(control));
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		cmsg = CMSG_FIRSTHDR(&message);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(cmsg), fds, fd_count * sizeof(int));
	}
	return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* The descriptors of a message: the first goes to *fd, others are closed. Returns how many there were. */
static uint32_t take_descriptors(struct msghdr *message, int *fd)
{
	struct cmsghdr *cmsg;
	uint32_t count = 0;

	*fd = -1;
	for (cmsg = CMSG_FIRSTHDR(message); cmsg; cmsg = CMSG_NXTHDR(message, cmsg)) {
		size_t offset;

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		for (offset = 0; offset + sizeof(int) <= cmsg->cmsg_len - CMSG_LEN(0); offset += sizeof(int)) {
			int received;

			memcpy(&received, CMSG_DATA(cmsg) + offset, sizeof(received));
			if (count++)
				close(received);
			else
				*fd = received;
		}
	}
	return count;
}

static bool is_frame(const struct header *header, size_t length)
{
	bool reply = header->flags & FLAG_REPLY, failed = header->flags & FLAG_ERROR, more = header->flags & FLAG_MORE;

	return header->size == length && !(header->flags & ~(uint32_t)(FLAG_REPLY | FLAG_ERROR | FLAG_MORE)) &&
	       (reply || !(failed || more)) && failed == (header->error != 0) && !(failed && more);
}

/* Receive one frame into agent->frame: its size; 0: nothing is there; -ENOTCONN: the end; -EBADMSG. */
static int receive_frame(struct irqrouter_agent *agent, int from, int *fd)
{
	union {
		char bytes[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {agent->frame, FRAME_MAX};
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	ssize_t length = recvmsg(from, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	uint32_t descriptors;

	*fd = -1;
	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -ENOTCONN;
	descriptors = take_descriptors(&message, fd);
	if (!length && !descriptors)
		return -ENOTCONN;
	if ((size_t)length < sizeof(struct header) || message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || descriptors > 1 ||
	    !is_frame((const struct header *)agent->frame, (size_t)length)) {
		close_fd(fd);
		return -EBADMSG;
	}
	return (int)length;
}

/* The operations behind a count; NULL if that is not what the payload is. */
static const struct operation *operations_of(const unsigned char *frame, uint32_t *count)
{
	const struct header *header = (const struct header *)frame;
	const struct counted *counted = (const struct counted *)(header + 1);

	if (header->size < sizeof(*header) + sizeof(*counted) || counted->reserved || counted->count > OPERATIONS_MAX ||
	    header->size != sizeof(*header) + sizeof(*counted) + counted->count * sizeof(struct operation))
		return NULL;
	*count = counted->count;
	return (const struct operation *)(counted + 1);
}

static bool is_operation(const struct operation *op, uint16_t command)
{
	bool flagged = op->kind == CATCH_FAULT || op->kind == ASSIGN;
	bool with_message = op->kind == SET_ROUTE || op->kind == CATCH || op->kind == PREPARE;

	if (op->reserved || op->flags > flagged)
		return false;
	if (command == TRANSLATE ? op->kind != MISS : op->kind < SET_ROUTE || op->kind > PREPARE)
		return false;
	if (command == INVALIDATE && op->kind != SET_ROUTE)
		return false;
	if (command == ADD && op->kind != SET_ROUTE && op->kind != ASSIGN)
		return false;
	if (op->kind == CATCH_FAULT)
		return true;
	return !op->tail && (with_message || (!op->address && !op->data));
}

static bool are_operations(const struct operation *ops, uint32_t count, uint16_t command)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		if (!is_operation(&ops[i], command))
			return false;
	}
	return true;
}

/* ---- requests. The lock is held. -------------------------------------------------------------------------------- */

/* An id that is not in use; what timed out stays in use as long as the connection lasts. -EAGAIN: too many are out. */
static int take_id(struct connection *connection, uint8_t what, uint16_t *id)
{
	uint32_t tries;

	if (connection->unanswered >= UNANSWERED_MAX)
		return -EAGAIN;
	for (tries = 0; tries < 65536; tries++) {
		*id = connection->next_id++;
		if (connection->ids[*id] == ID_FREE) {
			connection->ids[*id] = what;
			connection->unanswered++;
			return 0;
		}
	}
	return -ENOTCONN; /* every id is burnt */
}

static void free_id(struct connection *connection, uint16_t id)
{
	connection->ids[id] = ID_FREE;
	connection->unanswered--;
}

/* The agent's thread ends the connection, and begins anew: the next one is told everything. */
static void break_connection(struct irqrouter_agent *agent)
{
	agent->connection.broken = true;
	wake_agent(agent);
}

static int send_command(struct irqrouter_agent *agent, uint8_t what, uint16_t *id, const void *payload, size_t size,
			const int *fds, uint32_t fd_count)
{
	struct connection *connection = &agent->connection;
	struct header header = {.command = what & ID_COMMAND, .size = (uint32_t)(sizeof(header) + size)};
	int error = connection->broken ? -ENOTCONN : take_id(connection, what, id);

	if (!error) {
		header.id = *id;
		error = send_frame(connection->request_fd, &header, payload, fds, fd_count);
		if (!error)
			return 0;
		free_id(connection, *id);
	}
	if (error == -EAGAIN || error == -ENOBUFS || error == -ENOMEM || error == -ETOOMANYREFS)
		return -EAGAIN;
	break_connection(agent);
	return -ENOTCONN;
}

static int send_request(struct irqrouter_agent *agent, struct request *request, const void *payload, size_t size,
			const int *fds, uint32_t fd_count)
{
	int error = send_command(agent, (uint8_t)request->command, &request->id, payload, size, fds, fd_count);

	if (error)
		return error;
	request->sent = true;
	request->next = agent->requests;
	agent->requests = request;
	return 0;
}

/* The service does not answer: invalidations are made without it until it answers a PING. */
static void open_breaker(struct irqrouter_agent *agent)
{
	if (!agent->connection.breaker_open) {
		agent->connection.breaker_open = true;
		wake_agent(agent);
	}
}

static struct request **find_request(struct irqrouter_agent *agent, const struct request *request)
{
	struct request **link = &agent->requests;

	while (*link && *link != request)
		link = &(*link)->next;
	return link;
}

static void finish_request(struct request **link, int error)
{
	struct request *request = *link;

	*link = request->next;
	request->done = true;
	request->error = error;
	event_signal(&request->replied);
}

/* Wait for the reply; the lock is given up meanwhile. 0, -ETIMEDOUT, -ENOTCONN, or what the service said. */
static int await_reply(struct irqrouter_agent *agent, struct request *request, int64_t deadline)
{
	if (!request->sent)
		return -ENOTCONN;
	while (!request->done && now_ns() < deadline)
		wait_for(agent, &request->replied, deadline);
	if (request->done)
		return request->error;
	*find_request(agent, request) = request->next;
	agent->connection.ids[request->id] |= ID_BURNT;
	agent->stats.timeouts++;
	if (request->command == INVALIDATE)
		open_breaker(agent);
	else
		break_connection(agent); /* it may have heard, and wait for what was decided to be carried out */
	return -ETIMEDOUT;
}

/* Another frame of a reply. Returns 0, or -EBADMSG. */
static int take_reply(struct request **link, const unsigned char *frame)
{
	const struct header *header = (const struct header *)frame;
	struct request *request = *link;
	const struct operation *ops;
	uint32_t count;

	if (header->error) {
		finish_request(link, -(int)(header->error < 4096 ? header->error : EIO));
		return 0;
	}
	if (request->command == MEMORY) {
		if (header->size != sizeof(*header) || header->flags & FLAG_MORE)
			return -EBADMSG;
		finish_request(link, 0);
		return 0;
	}
	ops = operations_of(frame, &count);
	if (!ops || count > request->capacity - request->count || !are_operations(ops, count, request->command))
		return -EBADMSG;
	memcpy(request->ops + request->count, ops, count * sizeof(*ops));
	request->count += count;
	if (!(header->flags & FLAG_MORE))
		finish_request(link, 0);
	return 0;
}

/* ---- the connection. The agent's thread. ------------------------------------------------------------------------ */

/* What epoll says: the number of a vector, or one of these with the number of the connection. */
#define FROM_WAKE (1ull << 60)
#define FROM_REQUEST (2ull << 60)
#define FROM_BATCH (3ull << 60)
#define FROM_BELL (4ull << 60)
#define FROM_MASK (7ull << 60)

static int watch(struct irqrouter_agent *agent, int operation, int fd, uint32_t events, uint64_t from)
{
	struct epoll_event event = {.events = events, .data.u64 = from | agent->connection.number};

	return epoll_ctl(agent->epoll_fd, operation, fd, &event) ? -errno : 0;
}

static int watch_sockets(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	int error = watch(agent, EPOLL_CTL_ADD, connection->request_fd, EPOLLIN, FROM_REQUEST);

	connection->batch_events = EPOLLIN;
	return error ? error : watch(agent, EPOLL_CTL_ADD, connection->batch_fd, EPOLLIN, FROM_BATCH);
}

/* No batch is read while the reply to the one before waits for room. */
static void watch_batches(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	uint32_t events = connection->reply_size ? EPOLLOUT : EPOLLIN;

	if (events != connection->batch_events)
		watch(agent, EPOLL_CTL_MOD, connection->batch_fd, events, FROM_BATCH);
	connection->batch_events = events;
}

static void unmap_page(struct irqrouter_agent *agent)
{
	if (agent->page)
		munmap(agent->page, agent->page_size);
	agent->page = NULL;
}

static void end_connection(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;

	if (connection->request_fd >= 0)
		epoll_ctl(agent->epoll_fd, EPOLL_CTL_DEL, connection->request_fd, NULL);
	if (connection->batch_fd >= 0)
		epoll_ctl(agent->epoll_fd, EPOLL_CTL_DEL, connection->batch_fd, NULL);
	close_fd(&connection->request_fd);
	close_fd(&connection->batch_fd);
	close_fd(&connection->doorbell_fd);
	unmap_page(agent);
	while (agent->requests)
		finish_request(&agent->requests, -ENOTCONN);
	connection->state = APART;
	connection->breaker_open = false;
	agent->retry_at = now_ns() + agent->back_off;
	event_signal(&agent->connected);
}

/* End the connection, and begin another later. Prepared vectors are served meanwhile as before. */
static void drop_connection(struct irqrouter_agent *agent, const char *why)
{
	bool was_ready;

	lock(agent);
	if (agent->connection.state == APART) {
		unlock(agent);
		return;
	}
	was_ready = agent->connection.state == READY;
	if (was_ready && now_ns() - agent->connection.since >= BACK_OFF_MAX)
		agent->back_off = BACK_OFF_MIN;
	end_connection(agent);
	agent->back_off = agent->back_off * 2 < BACK_OFF_MAX ? agent->back_off * 2 : BACK_OFF_MAX;
	unlock(agent);
	/* Not each attempt of many. */
	if (was_ready || !agent->told)
		say(agent, "%s: %s: %s", agent->address.sun_path, was_ready ? "the service is lost" : "no service",
		    why);
	agent->told = true;
}

static void fail_connection(struct irqrouter_agent *agent, int error)
{
	if (error == -EBADMSG) {
		lock(agent);
		agent->stats.malformed++;
		unlock(agent);
		drop_connection(agent, "it sent a malformed frame");
	} else {
		drop_connection(agent, strerror(-error));
	}
}

/* What a connection begins with. */
struct sockets {
	int request, batch, service_end, doorbell;
};

/* Without the lock: to find the listening socket its path is looked up, on whatever file system that is. */
static int open_sockets(const struct irqrouter_agent *agent, struct sockets *sockets)
{
	int pair[2];

	*sockets = (struct sockets){-1, -1, -1, -1};
	sockets->request = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (sockets->request < 0 ||
	    connect(sockets->request, (const struct sockaddr *)&agent->address, sizeof(agent->address)))
		return -errno;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair))
		return -errno;
	sockets->batch = pair[0];
	sockets->service_end = pair[1];
	/* A new one each time: a service that was stopped, and runs again, must not take its successor's rings. */
	sockets->doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return sockets->doorbell < 0 ? -errno : 0;
}

static int send_hello(struct irqrouter_agent *agent, int service_end)
{
	struct connection *connection = &agent->connection;
	struct hello hello = {
		.magic = MAGIC,
		.version_low = VERSION,
		.version_high = VERSION,
		.features = FEATURE_PREPARE | FEATURE_WIDE,
		.remapper = (uint8_t)agent->remapper,
		.host_address_width = (uint8_t)agent->host_address_width,
		.slots = agent->slots,
	};
	int fds[2] = {service_end, connection->doorbell_fd};
	uint16_t id;

	memcpy(hello.name, agent->name, sizeof(hello.name));
	return send_command(agent, HELLO | ID_REPLAYED, &id, &hello, sizeof(hello), fds, 2);
}

static void begin_connection(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	struct sockets sockets;
	int error = open_sockets(agent, &sockets);

	lock(agent);
	connection->request_fd = sockets.request;
	connection->batch_fd = sockets.batch;
	connection->doorbell_fd = sockets.doorbell;
	connection->number++;
	connection->state = GREETING;
	connection->since = now_ns();
	connection->unanswered = connection->outstanding = connection->replay_next = connection->reply_size = 0;
	connection->broken = connection->want_out = connection->memory_sent = false;
	connection->breaker_open = connection->ping_sent = false;
	memset(connection->ids, ID_FREE, sizeof(connection->ids));
	if (!error)
		error = send_hello(agent, sockets.service_end);
	if (!error)
		error = watch_sockets(agent);
	unlock(agent);
	close_fd(&sockets.service_end);
	if (error)
		drop_connection(agent, strerror(-error));
}

/* The page must be a memfd that can neither shrink nor change its seals, or touching it may be a SIGBUS. */
static int map_page(struct irqrouter_agent *agent, int fd)
{
	const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	struct statfs file_system;
	struct stat status;
	void *page;

	if (fstat(fd, &status) || fstatfs(fd, &file_system))
		return -EPROTO;
	if (file_system.f_type != TMPFS_MAGIC || status.st_size != (off_t)page_size(agent->slots) ||
	    (fcntl(fd, F_GET_SEALS) & seals) != seals)
		return -EPROTO;
	if (fallocate(fd, 0, 0, status.st_size)) /* there is memory for it, now */
		return -errno;
	page = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED)
		return -errno;
	agent->page = page;
	agent->page_size = (size_t)status.st_size;
	return 0;
}

static void fill_page(struct irqrouter_agent *agent)
{
	uint32_t number;

	publish_header(agent);
	for (number = 0; number < agent->slots_used; number++) {
		publish(agent, &agent->vectors[number]);
		give_way(agent);
	}
}

static int take_welcome(struct irqrouter_agent *agent, int fd)
{
	const struct header *header = (const struct header *)agent->frame;
	const struct welcome *welcome = (const struct welcome *)(header + 1);
	int error;

	if (header->size != sizeof(*header) + sizeof(*welcome) || header->flags & FLAG_MORE || fd < 0 ||
	    welcome->version != VERSION || welcome->reserved || welcome->reserved2 ||
	    welcome->features & ~(uint64_t)(FEATURE_PREPARE | FEATURE_WIDE))
		return -EBADMSG;
	error = map_page(agent, fd);
	if (error)
		return error;
	agent->connection.features = welcome->features;
	agent->connection.state = REPLAYING;
	fill_page(agent);
	return 0;
}

static int send_memory(struct irqrouter_agent *agent, struct request *request)
{
	struct memory *memory = &agent->memory;
	size_t size = sizeof(struct counted) + memory->count * sizeof(struct wire_region);
	unsigned char *payload = malloc(size);
	struct counted counted = {memory->count, 0};
	uint16_t id;
	int error;

	if (!payload)
		return -ENOMEM;
	memcpy(payload, &counted, sizeof(counted));
	memcpy(payload + sizeof(counted), memory->regions, memory->count * sizeof(struct wire_region));
	if (request)
		error = send_request(agent, request, payload, size, memory->fds, memory->fd_count);
	else
		error = send_command(agent, MEMORY | ID_REPLAYED, &id, payload, size, memory->fds, memory->fd_count);
	free(payload);
	return error;
}

/* An ADD frame while it is made. */
struct adding {
	struct {
		struct counted counted;
		struct added entries[DESCRIPTORS_MAX];
	} payload;
	int fds[DESCRIPTORS_MAX];
};

static void put_added(struct adding *adding, const struct vector *vector, uint32_t flags)
{
	uint32_t i = adding->payload.counted.count++;

	adding->payload.entries[i] = (struct added){vector->number, flags, vector->born};
	adding->fds[i] = vector->fd;
}

static size_t adding_size(const struct adding *adding)
{
	return sizeof(struct counted) + adding->payload.counted.count * sizeof(struct added);
}

static void mark_announced(struct irqrouter_agent *agent, const struct adding *adding)
{
	uint32_t i;

	for (i = 0; i < adding->payload.counted.count; i++)
		agent->vectors[adding->payload.entries[i].vector].announced = agent->connection.number;
}

/* The next vectors that this connection's service does not know. 0: there are none. */
static int replay_vectors(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	struct adding adding;
	uint32_t number;
	uint16_t id;
	int error;

	adding.payload.counted = (struct counted){0, 0};
	for (number = connection->replay_next; number < agent->slots_used; number++) {
		struct vector *vector = find(agent, number);

		if (vector && vector->announced != connection->number)
			put_added(&adding, vector, 0);
		if (adding.payload.counted.count == DESCRIPTORS_MAX)
			break;
	}
	if (!adding.payload.counted.count)
		return 0;
	error = send_command(agent, ADD | ID_REPLAYED, &id, &adding.payload, adding_size(&adding), adding.fds,
			     adding.payload.counted.count);
	if (error)
		return error;
	mark_announced(agent, &adding);
	connection->replay_next = number;
	return 1;
}

/* Whether an earlier slot was filled while we went on: it comes in another round. */
static int replay_next(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	int result;

	if (!connection->memory_sent) {
		result = agent->memory.count ? send_memory(agent, NULL) : 0;
		if (result)
			return result;
		connection->memory_sent = true;
		if (agent->memory.count)
			return 1;
	}
	result = replay_vectors(agent);
	if (result || !connection->replay_next)
		return result;
	connection->replay_next = 0;
	return replay_vectors(agent);
}

/* Tell the service what it does not know. The lock is held. Several frames are on their way at a time. */
static int replay(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	int result = 1;

	while (connection->outstanding < REPLAY_WINDOW && result > 0) {
		result = replay_next(agent);
		connection->outstanding += result > 0;
	}
	/* Full: go on when a reply says that there is room, or that descriptors are no longer in flight. */
	connection->want_out = result == -EAGAIN && !connection->outstanding;
	if (result < 0 && result != -EAGAIN)
		return result;
	if (!result && !connection->outstanding) {
		connection->state = READY;
		connection->since = now_ns();
		agent->stats.connections++;
		ring(agent);
		event_signal(&agent->connected);
	}
	return 0;
}

/* A PING is out as long as the breaker is open; when it cannot be sent, then later. */
static int ping(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	uint16_t id;
	int error;

	if (connection->state != READY || !connection->breaker_open || connection->ping_sent)
		return 0;
	error = send_command(agent, PING | ID_REPLAYED, &id, NULL, 0, NULL, 0);
	connection->want_out = error == -EAGAIN;
	connection->ping_sent = !error;
	return error == -EAGAIN ? 0 : error;
}

static const char *error_text(const unsigned char *frame, char *text, size_t size)
{
	const struct header *header = (const struct header *)frame;
	size_t length = header->size - sizeof(*header);

	snprintf(text, size, "%s", strerror((int)header->error));
	if (length > 8) {
		length = length - 8 < size - 1 ? length - 8 : size - 1;
		memcpy(text, frame + sizeof(*header) + 8, length);
		text[length] = 0;
	}
	for (length = 0; text[length]; length++) { /* it is to be one line of the VMM's log */
		if ((unsigned char)text[length] < ' ' || text[length] == 0x7f)
			text[length] = '?';
	}
	return text;
}

/* A reply that no thread waits for: to what the agent's own thread sent. */
static int take_own_reply(struct irqrouter_agent *agent, uint8_t what, int fd)
{
	const struct header *header = (const struct header *)agent->frame;
	struct connection *connection = &agent->connection;

	if (header->error)
		return -ECONNREFUSED;
	switch (what & ID_COMMAND) {
	case HELLO:
		return connection->state == GREETING ? take_welcome(agent, fd) : -EBADMSG;
	case PING:
		if (header->size != sizeof(*header) || header->flags & FLAG_MORE)
			return -EBADMSG;
		connection->breaker_open = connection->ping_sent = false;
		return 0;
	default: /* MEMORY, ADD: nothing is carried out, as nothing was NEW */
		if (!(header->flags & FLAG_MORE))
			connection->outstanding--;
		return 0;
	}
}

/* A reply that came after its deadline is never carried out. */
static void take_late_reply(struct irqrouter_agent *agent)
{
	const struct header *header = (const struct header *)agent->frame;

	if (header->flags & FLAG_MORE)
		return;
	agent->stats.late++;
	agent->connection.unanswered--;
	agent->connection.ids[header->id] = ID_SPENT;
}

static int take_request_frame(struct irqrouter_agent *agent, int fd)
{
	const struct header *header = (const struct header *)agent->frame;
	struct connection *connection = &agent->connection;
	uint8_t what = connection->ids[header->id];
	struct request **link = &agent->requests;

	if (!(header->flags & FLAG_REPLY) || !(what & ID_COMMAND) || (what & ID_COMMAND) != header->command ||
	    (fd >= 0 && header->command != HELLO))
		return -EBADMSG;
	if (what & ID_BURNT) {
		take_late_reply(agent);
		return 0;
	}
	if (!(header->flags & FLAG_MORE))
		free_id(connection, header->id);
	if (what & ID_REPLAYED)
		return take_own_reply(agent, what, fd);
	while (*link && (*link)->id != header->id)
		link = &(*link)->next;
	return *link ? take_reply(link, agent->frame) : -EBADMSG;
}

static void read_requests(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	char text[512] = "";
	int turns, fd, error = 0;

	for (turns = 0; turns < FRAMES_PER_TURN && !error; turns++) {
		error = receive_frame(agent, connection->request_fd, &fd);
		if (!error)
			break;
		if (error > 0) {
			lock(agent);
			error = take_request_frame(agent, fd);
			if (error == -ECONNREFUSED)
				error_text(agent->frame, text, sizeof(text));
			unlock(agent);
			close_fd(&fd);
		}
	}
	if (error == -ECONNREFUSED)
		drop_connection(agent, text);
	else if (error)
		fail_connection(agent, error);
}

/* Send what waits to be sent: the replay, a PING. */
static void pump(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	int error = 0;

	lock(agent);
	if (connection->broken)
		error = -EPIPE;
	else if (connection->state == REPLAYING)
		error = replay(agent);
	else if (connection->state == READY)
		error = ping(agent);
	if (!error && connection->state != APART)
		watch_batches(agent);
	unlock(agent);
	if (error) {
		drop_connection(agent, strerror(-error));
	} else if (connection->state == READY && agent->told) {
		agent->told = false;
		say(agent, "%s: the service serves %s", agent->address.sun_path, agent->name);
	}
}

/* ---- batches and translations ----------------------------------------------------------------------------------- */

static void send_batch_reply(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	const struct header *header = (const struct header *)agent->reply;
	int error = send_frame(connection->batch_fd, header, header + 1, NULL, 0);

	if (error == -EAGAIN)
		return; /* reply_size says that it waits */
	connection->reply_size = 0;
	if (error)
		drop_connection(agent, strerror(-error));
}

static void put_reply(struct irqrouter_agent *agent, const void *array, uint32_t count, size_t each)
{
	const struct header *command = (const struct header *)agent->frame;
	struct header *header = (struct header *)agent->reply;
	struct counted *counted = (struct counted *)(header + 1);

	*header = (struct header){.id = command->id, .command = command->command, .flags = FLAG_REPLY};
	header->size = (uint32_t)(sizeof(*header) + sizeof(*counted) + count * each);
	*counted = (struct counted){count, 0};
	memcpy(counted + 1, array, count * each);
	agent->connection.reply_size = header->size;
	send_batch_reply(agent);
}

static void take_batch(struct irqrouter_agent *agent, const struct operation *ops, uint32_t count)
{
	run(agent, ops, count, agent->errnos, now_ns());
	settle(agent);
	lock(agent);
	agent->stats.batches++;
	unlock(agent);
	put_reply(agent, agent->errnos, count, sizeof(*agent->errnos));
}

/* The generation is sampled before the VMM looks at its tables, and the answer has it. */
static struct operation translate(struct irqrouter_agent *agent, const struct operation *op)
{
	struct operation answer = {.kind = MISS, .vector = op->vector, .generation = op->generation};
	struct irqrouter_translation found = {0};
	struct irqrouter_vector handle;
	struct message message;
	struct vector *vector;
	uint16_t requester;
	int outcome;

	lock(agent);
	vector = find(agent, op->vector);
	if (!vector || vector->generation != op->generation) {
		unlock(agent);
		return answer;
	}
	handle = (struct irqrouter_vector){vector->number, vector->born};
	message = vector->message;
	requester = vector->requester;
	unlock(agent);
	outcome = agent->options.translate(agent->options.opaque, &handle, message.address, message.data, requester,
					   &found);
	if (outcome == IRQROUTER_MESSAGE) {
		answer.kind = UPDATE;
		answer.address = found.address;
		answer.data = found.data;
	} else if (outcome == IRQROUTER_FAULT) {
		answer.kind = FAULT;
		answer.address = found.low;
		answer.data = (uint32_t)found.high;
		answer.tail = (uint32_t)(found.high >> 32);
	}
	return answer;
}

static void take_translate(struct irqrouter_agent *agent, struct operation *ops, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		ops[i] = translate(agent, &ops[i]);
	put_reply(agent, ops, count, sizeof(*ops));
}

static int take_batch_frame(struct irqrouter_agent *agent, int fd)
{
	const struct header *header = (const struct header *)agent->frame;
	const struct operation *ops;
	uint32_t count;

	if (fd >= 0 || header->flags || (header->command != BATCH && header->command != TRANSLATE) ||
	    (header->command == TRANSLATE && agent->remapper != IRQROUTER_REMAPPER_VMM))
		return -EBADMSG;
	ops = operations_of(agent->frame, &count);
	if (!ops || !are_operations(ops, count, header->command))
		return -EBADMSG;
	if (header->command == BATCH)
		take_batch(agent, ops, count);
	else
		take_translate(agent, (struct operation *)ops, count);
	return 0;
}

static void read_batches(struct irqrouter_agent *agent)
{
	struct connection *connection = &agent->connection;
	int turns, fd, result = 1;

	if (connection->reply_size)
		send_batch_reply(agent);
	for (turns = 0; turns < FRAMES_PER_TURN && connection->state != APART && !connection->reply_size; turns++) {
		result = receive_frame(agent, connection->batch_fd, &fd);
		if (!result)
			break;
		if (result > 0)
			result = take_batch_frame(agent, fd);
		close_fd(&fd);
		if (result < 0) {
			fail_connection(agent, result);
			break;
		}
	}
}

/* ---- the agent's thread ----------------------------------------------------------------------------------------- */

static void handle_event(struct irqrouter_agent *agent, const struct epoll_event *event, int64_t woken)
{
	uint64_t what = event->data.u64;
	eventfd_t count;

	if ((what & FROM_MASK) == 0) {
		fired(agent, (uint32_t)what, woken);
	} else if ((what & FROM_MASK) == FROM_WAKE) {
		eventfd_read(agent->wake_fd, &count);
	} else if ((what & FROM_MASK) == FROM_BELL) {
		end_run(agent);
	} else if ((what & ~FROM_MASK) == agent->connection.number && agent->connection.state != APART) {
		if ((what & FROM_MASK) == FROM_BATCH)
			read_batches(agent);
		else
			read_requests(agent);
	}
}

static void connect_if_due(struct irqrouter_agent *agent, int64_t now)
{
	struct connection *connection = &agent->connection;

	if (connection->state == APART && now >= agent->retry_at)
		begin_connection(agent);
	if (connection->state == GREETING && now >= connection->since + HELLO_DEADLINE)
		drop_connection(agent, "it does not answer");
}

/* When to look again at the latest. */
static int64_t next_deadline(const struct irqrouter_agent *agent)
{
	const struct connection *connection = &agent->connection;

	if (connection->state == APART)
		return agent->retry_at;
	if (connection->want_out)
		return now_ns() + BACK_OFF_MIN;
	return connection->state == GREETING ? connection->since + HELLO_DEADLINE : FOREVER;
}

static bool is_closing(struct irqrouter_agent *agent)
{
	bool closing;

	lock(agent);
	closing = agent->closing;
	unlock(agent);
	return closing;
}

static int timeout_until(int64_t deadline)
{
	int64_t left = deadline - now_ns();

	if (deadline == FOREVER)
		return -1;
	return left <= 0 ? 0 : (int)((left + MS - 1) / MS);
}

static void *agent_main(void *argument)
{
	struct irqrouter_agent *agent = argument;
	struct epoll_event events[HARVEST_MAX];
	int i, count;

	while (!is_closing(agent)) {
		int64_t woken;

		connect_if_due(agent, now_ns());
		pump(agent);
		count = epoll_wait(agent->epoll_fd, events, HARVEST_MAX, timeout_until(next_deadline(agent)));
		woken = now_ns();
		for (i = 0; i < count; i++) { /* events of devices first */
			if ((events[i].data.u64 & FROM_MASK) == 0)
				handle_event(agent, &events[i], woken);
		}
		settle(agent);
		for (i = 0; i < count; i++) {
			if ((events[i].data.u64 & FROM_MASK) != 0)
				handle_event(agent, &events[i], woken);
		}
	}
	lock(agent);
	if (agent->connection.state != APART)
		end_connection(agent);
	unlock(agent);
	return NULL;
}

/* ---- verbs: adding and removing --------------------------------------------------------------------------------- */

static bool has_identity(const struct irqrouter_agent *agent, uint64_t identity)
{
	uint32_t i;

	for (i = 0; i < agent->slots_used; i++) {
		if (agent->identities[i] == identity)
			return true;
	}
	return false;
}

/* The slot that has been free longest: what was said about its former vector has been heard by then. */
static struct vector *take_slot(struct irqrouter_agent *agent)
{
	struct vector *vector;

	if (agent->free_count) {
		vector = &agent->vectors[agent->free_slots[agent->free_first]];
		agent->free_first = (agent->free_first + 1) % agent->slots;
		agent->free_count--;
		return vector;
	}
	if (agent->slots_used == agent->slots)
		return NULL;
	vector = &agent->vectors[agent->slots_used];
	vector->number = agent->slots_used++;
	vector->fd = vector->resample_fd = -1;
	return vector;
}

static void return_slot(struct irqrouter_agent *agent, struct vector *vector)
{
	agent->free_slots[(agent->free_first + agent->free_count++) % agent->slots] = vector->number;
}

/* A source whose eventfds we have duplicates of. */
struct adopted {
	const struct irqrouter_source *source;
	int fd, resample_fd;
	uint64_t identity;
	struct irqrouter_vector handle;
};

static bool is_source(const struct irqrouter_agent *agent, const struct irqrouter_source *source)
{
	return source->requester <= 0xffff && !(source->flags & ~(IRQROUTER_MASKED | IRQROUTER_LEVEL)) &&
	       (agent->remapper != IRQROUTER_REMAPPER_VMM || source->cookie <= IRQROUTER_UNINDEXED);
}

static int adopt(const struct irqrouter_agent *agent, const struct irqrouter_source *source, struct adopted *out)
{
	uint64_t ignored;
	int error;

	*out = (struct adopted){.source = source, .fd = -1, .resample_fd = -1};
	if (!is_source(agent, source))
		return -EINVAL;
	error = adopt_eventfd(source->eventfd, &out->fd, &out->identity);
	if (!error && source->flags & IRQROUTER_LEVEL && source->resample >= 0)
		error = adopt_eventfd(source->resample, &out->resample_fd, &ignored);
	if (error)
		close_fd(&out->fd);
	return error;
}

static void init_vector(struct irqrouter_agent *agent, struct vector *vector, const struct adopted *adopted)
{
	const struct irqrouter_source *source = adopted->source;

	vector->state = source->flags & IRQROUTER_MASKED ? MASKED : DEASSIGNED;
	vector->born = vector->generation = ++agent->last_generation;
	vector->routed_generation = vector->accepted_generation = 0;
	vector->message = (struct message){source->address, source->data};
	vector->requester = (uint16_t)source->requester;
	vector->cookie = cookie_of(agent, &vector->message, vector->requester, source->cookie);
	vector->refused = 0;
	vector->level = source->flags & IRQROUTER_LEVEL;
	vector->in_service = vector->discarded_last = vector->prepared = false;
	vector->fd = adopted->fd;
	vector->resample_fd = adopted->resample_fd;
	vector->announced = 0;
	vector->lost_races = vector->invalidations = vector->caught = vector->faults = 0;
	vector->stale = vector->discarded = vector->last_catch_ns = 0;
	vector->last_catch_at = 0;
	agent->identities[vector->number] = adopted->identity;
	agent->level_count += vector->level;
	agent->vector_count++;
	join_cookie(agent, vector);
	publish(agent, vector);
}

static int make_vector(struct irqrouter_agent *agent, struct adopted *adopted)
{
	struct vector *vector;

	if (has_identity(agent, adopted->identity))
		return -EEXIST;
	vector = take_slot(agent);
	if (!vector)
		return -ENOSPC;
	if (allocate_gsi(&agent->routes, vector)) {
		return_slot(agent, vector);
		return -ENOSPC;
	}
	init_vector(agent, vector, adopted);
	adopted->handle = (struct irqrouter_vector){vector->number, vector->born};
	adopted->fd = adopted->resample_fd = -1; /* the vector's now */
	return 0;
}

/* From now on nobody finds it. Its irqfd may still be there. */
static uint64_t begin_removal(struct irqrouter_agent *agent, struct vector *vector, uint64_t token)
{
	uint64_t order = happen(agent, vector, GOT_REMOVED, vector->cookie);

	vector->removed_by = token;
	leave_cookie(vector);
	return order;
}

/* Let go of what a removed vector held; but a GSI that KVM has kept an irqfd for must never be another vector's. */
static void release(struct irqrouter_agent *agent, struct vector *vector)
{
	drop_route(&agent->routes, vector->gsi);
	if (!vector->deassigning)
		free_gsi(&agent->routes, vector->gsi);
	end_deassign(agent, vector);
	close_eventfd(agent, vector);
	agent->identities[vector->number] = 0;
	agent->level_count -= vector->level;
	agent->vector_count--;
	vector->state = FREE;
	publish(agent, vector);
	return_slot(agent, vector);
}

static struct vector *vector_of(struct irqrouter_agent *agent, const struct irqrouter_vector *handle)
{
	struct vector *vector = handle->number < agent->slots_used ? &agent->vectors[handle->number] : NULL;

	return vector && vector->born == handle->born && vector->state != FREE ? vector : NULL;
}

/* Remove those that are still there: the irqfds go before the routes do, which go with one table write. */
static int remove_all(struct irqrouter_agent *agent, const struct irqrouter_vector *handles, size_t count)
{
	uint64_t token;
	int failure = 0;
	size_t i;

	lock(agent);
	token = ++agent->removals;
	for (i = 0; i < count; i++) {
		struct vector *vector = known(agent, &handles[i]);

		if (vector)
			begin_removal(agent, vector, token);
		give_way(agent);
	}
	for (i = 0; i < count; i++) {
		struct vector *vector = vector_of(agent, &handles[i]);
		int error = vector ? finish_deassign(agent, vector, on_its_way(vector)) : 0;

		failure = error ? error : failure;
		vector = vector_of(agent, &handles[i]); /* still: others may remove the same */
		if (vector && vector->state == REMOVED && vector->removed_by == token)
			release(agent, vector);
		give_way(agent);
	}
	ring(agent);
	unlock(agent);
	write_routes(agent); /* if refused, the dropped routes lead nowhere, and go with the next write */
	return failure;
}

int irqrouter_agent_remove(struct irqrouter_agent *agent, const struct irqrouter_vector *vectors, size_t count)
{
	bool all = true;
	size_t i;

	lock(agent);
	for (i = 0; i < count && all; i++)
		all = known(agent, &vectors[i]) != NULL;
	unlock(agent);
	return all ? remove_all(agent, vectors, count) : -ENOENT;
}

/* An add() on its way. */
struct addition {
	struct adopted *adopted;
	size_t count;
	struct request *requests;
	struct operation *ops;
	uint32_t *errnos;
	uint32_t frames;
};

#define OPS_PER_FRAME (2 * DESCRIPTORS_MAX)

static int allocate_addition(struct addition *addition, size_t count)
{
	*addition = (struct addition){.count = count};
	addition->frames = (uint32_t)((count + DESCRIPTORS_MAX - 1) / DESCRIPTORS_MAX);
	addition->adopted = calloc(count, sizeof(*addition->adopted));
	addition->requests = calloc(addition->frames, sizeof(*addition->requests));
	addition->ops = calloc((size_t)addition->frames * OPS_PER_FRAME, sizeof(*addition->ops));
	addition->errnos = calloc((size_t)addition->frames * OPS_PER_FRAME, sizeof(*addition->errnos));
	return addition->adopted && addition->requests && addition->ops && addition->errnos ? 0 : -ENOMEM;
}

static void free_addition(struct addition *addition)
{
	free(addition->adopted);
	free(addition->requests);
	free(addition->ops);
	free(addition->errnos);
}

/* The vectors of one frame, as a frame; but for those that a replay has told the service of, or that were removed. */
static void gather(struct irqrouter_agent *agent, const struct addition *addition, uint32_t frame,
		   struct adding *adding)
{
	size_t i = (size_t)frame * DESCRIPTORS_MAX;
	size_t end = i + DESCRIPTORS_MAX < addition->count ? i + DESCRIPTORS_MAX : addition->count;

	adding->payload.counted = (struct counted){0, 0};
	for (; i < end; i++) {
		const struct vector *vector = known(agent, &addition->adopted[i].handle);

		if (vector && vector->announced != agent->connection.number)
			put_added(adding, vector, FLAG_NEW);
	}
}

/* Send one ADD frame, waiting for room if there is none. The lock is held, and given up meanwhile. */
static void send_adding(struct irqrouter_agent *agent, const struct addition *addition, uint32_t frame,
			int64_t deadline)
{
	uint64_t connection = agent->connection.number;
	struct request *request = &addition->requests[frame];
	struct adding adding;
	int error;

	*request = (struct request){.command = ADD, .capacity = OPS_PER_FRAME};
	request->ops = addition->ops + (size_t)frame * OPS_PER_FRAME;
	while (agent->connection.state == READY && agent->connection.number == connection) {
		gather(agent, addition, frame, &adding);
		if (!adding.payload.counted.count)
			return;
		error = send_request(agent, request, &adding.payload, adding_size(&adding), adding.fds,
				     adding.payload.counted.count);
		if (!error)
			mark_announced(agent, &adding);
		if (error != -EAGAIN)
			return;
		if (now_ns() >= deadline) { /* nobody else would tell the service */
			break_connection(agent);
			return;
		}
		wait_for(agent, &agent->connected, now_ns() + MS);
	}
}

/* Have the service decide about new vectors. 0, or what it refuses them for. The lock is held. */
static int ask_about(struct irqrouter_agent *agent, struct addition *addition)
{
	int64_t deadline = now_ns() + (agent->connection.breaker_open ? agent->deadline : SETUP_DEADLINE);
	int refused = 0, error;
	uint32_t frame;

	for (frame = 0; frame < addition->frames; frame++)
		send_adding(agent, addition, frame, deadline);
	for (frame = 0; frame < addition->frames; frame++) {
		error = await_reply(agent, &addition->requests[frame], deadline);
		if (error)
			addition->requests[frame].count = 0;
		if (error && error != -ETIMEDOUT && error != -ENOTCONN)
			refused = error;
	}
	return refused;
}

/* What is no refusal: the vector changed meanwhile, or needed nothing. */
static bool is_moot(uint32_t error)
{
	return error == 0 || error == ESTALE || error == EALREADY || error == ECANCELED || error == EINPROGRESS ||
	       error == EOPNOTSUPP;
}

/* All frames' operations as one batch, so that there is one table write. */
static int carry_out_addition(struct irqrouter_agent *agent, struct addition *addition)
{
	uint32_t frame, count = 0, i;

	for (frame = 0; frame < addition->frames; frame++) {
		struct request *request = &addition->requests[frame];

		memmove(addition->ops + count, request->ops, request->count * sizeof(*request->ops));
		count += request->count;
	}
	run(agent, addition->ops, count, addition->errnos, now_ns());
	for (i = 0; i < count; i++) {
		if (!is_moot(addition->errnos[i]))
			return -(int)addition->errnos[i];
	}
	return 0;
}

static int make_vectors(struct irqrouter_agent *agent, struct addition *addition, size_t *made)
{
	int error = 0;

	for (*made = 0; *made < addition->count && !error; *made += !error) {
		error = make_vector(agent, &addition->adopted[*made]);
		give_way(agent);
	}
	publish_header(agent);
	return error;
}

static int add_adopted(struct irqrouter_agent *agent, struct addition *addition, struct irqrouter_vector *out)
{
	bool ready;
	size_t made, i;
	int error;

	lock(agent);
	error = make_vectors(agent, addition, &made);
	ready = agent->connection.state == READY;
	if (!error && ready)
		error = ask_about(agent, addition);
	unlock(agent);
	if (!error && ready)
		error = carry_out_addition(agent, addition);
	for (i = 0; i < made; i++)
		out[i] = addition->adopted[i].handle;
	if (error)
		remove_all(agent, out, made);
	lock(agent);
	ring(agent);
	unlock(agent);
	return error;
}

int irqrouter_agent_add(struct irqrouter_agent *agent, const struct irqrouter_source *sources, size_t count,
			struct irqrouter_vector *out)
{
	struct addition addition;
	size_t adopted = 0;
	int error;

	if (!count)
		return 0;
	if (count > agent->slots)
		return -ENOSPC;
	error = allocate_addition(&addition, count);
	while (!error && adopted < count) {
		error = adopt(agent, &sources[adopted], &addition.adopted[adopted]);
		adopted += !error;
	}
	if (!error)
		error = add_adopted(agent, &addition, out);
	while (adopted--) {
		close_fd(&addition.adopted[adopted].fd);
		close_fd(&addition.adopted[adopted].resample_fd);
	}
	free_addition(&addition);
	return error;
}

/* ---- verbs: one vector ------------------------------------------------------------------------------------------ */

static int change(struct irqrouter_agent *agent, const struct irqrouter_vector *handle, enum happening what)
{
	struct vector *vector;
	int error = -ENOENT;

	lock(agent);
	vector = known(agent, handle);
	if (vector) {
		uint64_t order = happen(agent, vector, what, vector->cookie);

		ring(agent);
		error = finish_deassign(agent, vector, order);
	}
	unlock(agent);
	return error;
}

int irqrouter_agent_mask(struct irqrouter_agent *agent, const struct irqrouter_vector *vector)
{
	return change(agent, vector, GOT_MASKED);
}

int irqrouter_agent_unmask(struct irqrouter_agent *agent, const struct irqrouter_vector *vector)
{
	return change(agent, vector, UNMASKED);
}

int irqrouter_agent_program(struct irqrouter_agent *agent, const struct irqrouter_vector *handle, uint64_t address,
			    uint32_t data, uint32_t cookie)
{
	struct vector *vector;
	int error = -ENOENT;

	if (agent->remapper == IRQROUTER_REMAPPER_VMM && cookie > IRQROUTER_UNINDEXED)
		return -EINVAL;
	lock(agent);
	vector = known(agent, handle);
	if (vector) {
		uint32_t before = vector->cookie;
		uint64_t order;

		/* The cookie changes with the message, at once: an invalidation may be next. */
		leave_cookie(vector);
		vector->message = (struct message){address, data};
		vector->cookie = cookie_of(agent, &vector->message, vector->requester, cookie);
		join_cookie(agent, vector);
		order = happen(agent, vector, PROGRAMMED, before);
		ring(agent);
		error = finish_deassign(agent, vector, order);
	}
	unlock(agent);
	return error;
}

/* ---- verbs: invalidating ---------------------------------------------------------------------------------------- */

struct invalidation {
	struct scope scope;
	struct entry *entries;
	uint32_t capacity, count;
	uint32_t touched;
	bool wide, starved;
	uint64_t waited_ns; /* for the service */
	struct scratch *scratch;
	struct entry few_entries[STACK_ENTRIES];
};

static struct scratch *make_scratch(uint32_t slots)
{
	struct scratch *scratch = calloc(1, sizeof(*scratch));

	if (!scratch)
		return NULL;
	scratch->entries = calloc(slots, sizeof(*scratch->entries));
	scratch->ops = calloc(slots, sizeof(*scratch->ops));
	if (scratch->entries && scratch->ops)
		return scratch;
	free(scratch->entries);
	free(scratch->ops);
	free(scratch);
	return NULL;
}

static void free_scratch(struct scratch *scratch)
{
	free(scratch->entries);
	free(scratch->ops);
	free(scratch);
}

/* There is at least one, so whoever cannot get memory waits for that. The lock is held, and may be given up. */
static void get_scratch(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	struct scratch *scratch;

	while (!agent->pool) {
		unlock(agent);
		scratch = make_scratch(agent->slots);
		lock(agent);
		if (scratch) {
			scratch->next = agent->pool;
			agent->pool = scratch;
		} else if (!agent->pool) {
			wait_for(agent, &agent->scratch_returned, now_ns() + MS);
		}
	}
	scratch = agent->pool;
	agent->pool = scratch->next;
	invalidation->scratch = scratch;
	invalidation->entries = scratch->entries;
	invalidation->capacity = agent->slots;
}

static void put_scratch(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	if (!invalidation->scratch)
		return;
	invalidation->scratch->next = agent->pool;
	agent->pool = invalidation->scratch;
	event_signal(&agent->scratch_returned);
}

static bool put_entry(struct invalidation *invalidation, struct vector *vector)
{
	if (invalidation->count == invalidation->capacity)
		return false;
	invalidation->entries[invalidation->count++] = (struct entry){.vector = vector, .born = vector->born};
	return true;
}

/* By cookie. A chain is followed without giving way: it is a few nanoseconds for each vector. */
static bool collect_narrow(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	struct vector *vector;
	uint32_t cookie;

	for (cookie = invalidation->scope.first; cookie <= invalidation->scope.last; cookie++) {
		for (vector = agent->by_cookie[cookie]; vector; vector = vector->next_by_cookie) {
			if (!put_entry(invalidation, vector))
				return false;
		}
	}
	return true;
}

/* By slot. What comes to be while we give way was made after the guest changed its tables. */
static bool collect_broad(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	const struct scope *scope = &invalidation->scope;
	uint32_t number;

	for (number = 0; number < agent->slots_used; number++) {
		struct vector *vector = find(agent, number);

		if (vector && is_in(scope, vector->cookie) && !put_entry(invalidation, vector))
			return false;
		if (number % 64 == 63)
			give_way(agent);
	}
	return true;
}

static bool collect(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	bool narrow = invalidation->scope.last - invalidation->scope.first < NARROW_COOKIES;

	invalidation->count = 0;
	return narrow ? collect_narrow(agent, invalidation) : collect_broad(agent, invalidation);
}

static struct vector *entry_vector(const struct entry *entry)
{
	struct vector *vector = entry->vector;

	return vector->born == entry->born && is_there(vector) ? vector : NULL;
}

static bool is_heard(const struct irqrouter_agent *agent)
{
	return agent->connection.state == READY && !agent->connection.breaker_open;
}

/* Whether the service is to be asked: if more irqfds would go than we take away at once. */
static bool wants_wide(struct irqrouter_agent *agent, const struct invalidation *invalidation)
{
	uint32_t i, assigned = 0;

	for (i = 0; i < invalidation->count; i++) {
		const struct vector *vector = entry_vector(&invalidation->entries[i]);

		assigned += vector && vector->state == ASSIGNED;
	}
	if (assigned <= agent->few || agent->remapper == IRQROUTER_REMAPPER_VMM)
		return false;
	if (is_heard(agent) && agent->connection.features & FEATURE_WIDE)
		return true;
	agent->stats.fallbacks++;
	return false;
}

/* False: it takes more memory. A reply may be about vectors that came to match only now, so it has room for all. */
static bool begin(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	if (!collect(agent, invalidation))
		return false;
	invalidation->wide = wants_wide(agent, invalidation);
	return !invalidation->wide || invalidation->scratch;
}

static void renew(struct irqrouter_agent *agent, struct invalidation *invalidation, struct entry *entry)
{
	struct vector *vector = entry_vector(entry);
	const struct route *route;

	if (!vector)
		return; /* gone meanwhile: its irqfd has the cookie still, see finish_deassigns_of() */
	invalidation->touched++;
	vector->invalidations++;
	route = &agent->routes.by_gsi[vector->gsi];
	entry->certain = route->have && !route->changed;
	entry->before = route->accepted;
	entry->order = happen(agent, vector, invalidation->wide ? WIDENED : INVALIDATED, vector->cookie);
	entry->generation = vector->generation;
	entry->kept = vector->state == ASSIGNED;
	entry->starved = vector->state == DEASSIGNED && vector->lost_races >= PATIENCE && is_heard(agent) &&
			 is_pending(vector->fd);
	invalidation->starved |= entry->starved;
}

static int finish_entries(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	int failure = 0, error;
	uint32_t i;

	for (i = 0; i < invalidation->count; i++) {
		struct entry *entry = &invalidation->entries[i];

		error = entry->order ? finish_deassign(agent, entry->vector, entry->order) : 0;
		entry->order = 0;
		failure = error ? error : failure;
	}
	return failure;
}

static void miss_route(struct irqrouter_agent *agent, struct entry *entry, struct vector *vector)
{
	if (vector->state != ASSIGNED)
		return;
	entry->order = happen(agent, vector, ROUTE_MISSED, vector->cookie);
	agent->to_ring = true;
}

/*
 * Whether a vector may stay assigned, once KVM has accepted the route it wants: that must have been decided after the
 * invalidation began, and a table write must be enough for KVM to deliver nothing more by the one before.
 */
static bool may_stay(const struct irqrouter_agent *agent, const struct entry *entry, const struct vector *vector)
{
	const struct route *route = &agent->routes.by_gsi[vector->gsi];

	if (vector->routed_generation < entry->generation || !entry->certain || !route->want)
		return false;
	return same(&entry->before, &route->wanted) ||
	       (!vector->discarded_last && single_destination(&entry->before) && single_destination(&route->wanted));
}

static void set_routes(struct irqrouter_agent *agent, const struct request *request)
{
	uint32_t i;

	for (i = 0; i < request->count; i++) {
		run_one(agent, &request->ops[i], 0);
		give_way(agent);
	}
}

/* Deassign what may not stay, while the old route is in the table: what KVM has put off is delivered by it. */
static int deassign_unrouted(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	uint32_t i;

	for (i = 0; i < invalidation->count; i++) {
		struct entry *entry = &invalidation->entries[i];
		struct vector *vector = entry->kept ? entry_vector(entry) : NULL;

		if (vector && !may_stay(agent, entry, vector))
			miss_route(agent, entry, vector);
		give_way(agent);
	}
	ring_if_due(agent);
	return finish_entries(agent, invalidation);
}

/*
 * After the write. What it refused is deassigned by now, or about to be; left is what was given yet another route
 * during the write, maybe by an invalidation that began before ours.
 */
static int deassign_unaccepted(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	uint32_t i;

	for (i = 0; i < invalidation->count; i++) {
		struct entry *entry = &invalidation->entries[i];
		struct vector *vector = entry->kept ? entry_vector(entry) : NULL;

		if (!vector)
			continue;
		entry->order = on_its_way(vector);
		if (vector->accepted_generation < entry->generation)
			miss_route(agent, entry, vector);
		give_way(agent);
	}
	ring_if_due(agent);
	return finish_entries(agent, invalidation);
}

/* The second half of a wide invalidation, when the service has answered, or has not. The lock is held. */
static int finish_wide(struct irqrouter_agent *agent, struct invalidation *invalidation, struct request *request)
{
	int64_t asked = now_ns();
	int answer = await_reply(agent, request, asked + agent->deadline);
	int failure, error;

	invalidation->waited_ns = (uint64_t)(now_ns() - asked);
	if (invalidation->waited_ns > agent->stats.longest_wait_ns)
		agent->stats.longest_wait_ns = invalidation->waited_ns;
	if (!answer) {
		agent->stats.wide_served++;
		set_routes(agent, request);
	} else {
		agent->stats.fallbacks++;
	}
	failure = deassign_unrouted(agent, invalidation);
	unlock(agent);
	write_routes(agent);
	lock(agent);
	error = deassign_unaccepted(agent, invalidation);
	return error ? error : failure;
}

/* Never waits. The lock is held. */
static void ask_wide(struct irqrouter_agent *agent, struct invalidation *invalidation, struct request *request)
{
	*request = (struct request){.command = INVALIDATE, .ops = invalidation->scratch->ops, .capacity = agent->slots};
	agent->stats.wide++;
	if (send_request(agent, request, &invalidation->scope, sizeof(invalidation->scope), NULL, 0) == -EAGAIN)
		open_breaker(agent); /* its socket is full: it does not read */
}

/* Vectors that kept losing the race: let the service, which was rung, catch their events before others renew them. */
static void wait_for_starved(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	int64_t deadline = now_ns() + STARVED_WAIT;
	uint32_t i;

	agent->stats.starved++;
	for (i = 0; i < invalidation->count; i++) {
		struct entry *entry = &invalidation->entries[i];
		struct vector *vector;

		if (!entry->starved)
			continue;
		while ((vector = entry_vector(entry)) && vector->state == DEASSIGNED &&
		       vector->lost_races >= PATIENCE && is_heard(agent) && now_ns() < deadline)
			wait_for(agent, &agent->served, deadline);
		if (vector)
			vector->lost_races = 0; /* waited for once; it must lose some more to be waited for again */
	}
}

static int invalidate(struct irqrouter_agent *agent, struct invalidation *invalidation)
{
	struct request request;
	int failure, error;
	bool many;
	uint32_t i;

	while (!begin(agent, invalidation))
		get_scratch(agent, invalidation);
	for (i = 0; i < invalidation->count; i++) {
		renew(agent, invalidation, &invalidation->entries[i]);
		give_way(agent);
	}
	begin_deassigns_anew(agent, &invalidation->scope);
	many = invalidation->count > agent->few;
	if (invalidation->touched && many)
		ring(agent); /* the service can translate while we wait for KVM */
	if (invalidation->wide)
		ask_wide(agent, invalidation, &request);
	failure = finish_entries(agent, invalidation);
	error = invalidation->wide ? finish_wide(agent, invalidation, &request) : 0;
	failure = error ? error : failure;
	error = finish_deassigns_of(agent, &invalidation->scope); /* also of what was removed while we waited */
	failure = error ? error : failure;
	if (invalidation->touched && !many && !invalidation->starved)
		ring_after_run(agent);
	if (invalidation->starved) {
		ring(agent);
		wait_for_starved(agent, invalidation);
	}
	return failure ? failure : (int)invalidation->touched;
}

static int invalidate_scope(struct irqrouter_agent *agent, uint32_t first, uint32_t last, uint64_t *waited_ns)
{
	struct invalidation invalidation;
	int result;

	if (first > last || last > IRQROUTER_UNINDEXED)
		return -EINVAL;
	invalidation.waited_ns = 0;
	invalidation.scope = (struct scope){first, last};
	invalidation.entries = invalidation.few_entries;
	invalidation.capacity = STACK_ENTRIES;
	invalidation.touched = 0;
	invalidation.starved = false;
	invalidation.scratch = NULL;
	lock(agent);
	agent->invalidating++;
	result = invalidate(agent, &invalidation);
	agent->invalidating--;
	put_scratch(agent, &invalidation);
	unlock(agent);
	*waited_ns = invalidation.waited_ns;
	return result;
}

int irqrouter_agent_invalidate(struct irqrouter_agent *agent, uint32_t first, uint32_t last)
{
	uint64_t waited_ns;

	return invalidate_scope(agent, first, last, &waited_ns);
}

int irqrouter_agent_invalidate_timed(struct irqrouter_agent *agent, uint32_t first, uint32_t last, uint64_t *ns,
				     uint64_t *waited_ns)
{
	int64_t began = now_ns();
	int result = invalidate_scope(agent, first, last, waited_ns);

	*ns = (uint64_t)(now_ns() - began);
	return result;
}

int irqrouter_agent_set_registers(struct irqrouter_agent *agent, uint64_t table, uint64_t control)
{
	lock(agent);
	agent->table = table;
	agent->control = control;
	publish_header(agent); /* before the generations that cover it */
	unlock(agent);
	return irqrouter_agent_invalidate(agent, 0, IRQROUTER_UNINDEXED);
}

/* ---- verbs: memory ---------------------------------------------------------------------------------------------- */

static bool contains(const struct irqrouter_region *region, uintptr_t address)
{
	uintptr_t begin = (uintptr_t)region->host_address;

	return address >= begin && address - begin < region->size;
}

/*
 * How far one line of /proc/self/maps takes us: the address behind it, or 0 where it is not the region's memory. What
 * is mapped privately has copies of its own of the pages that the guest writes; the service would read others.
 */
static uintptr_t check_mapping(const char *line, const struct irqrouter_region *region, const struct stat *file,
			       uintptr_t address)
{
	unsigned long begin, end, inode;
	unsigned long long offset;
	unsigned int major, minor;
	char flags[8];

	if (sscanf(line, "%lx-%lx %7s %llx %x:%x %lu", &begin, &end, flags, &offset, &major, &minor, &inode) != 7)
		return 0;
	if (address < begin || address >= end)
		return address;
	if (flags[3] != 's' || inode != file->st_ino || makedev(major, minor) != file->st_dev)
		return 0;
	if (offset + (address - begin) != region->offset + (address - (uintptr_t)region->host_address))
		return 0;
	return end;
}

static int check_mapped(const struct irqrouter_region *region)
{
	uintptr_t address = (uintptr_t)region->host_address;
	char *line = NULL;
	size_t size = 0;
	struct stat file;
	FILE *maps;

	if (!region->host_address)
		return 0;
	if (fstat(region->fd, &file))
		return -errno;
	maps = fopen("/proc/self/maps", "re");
	if (!maps)
		return -errno;
	while (contains(region, address) && address && getline(&line, &size, maps) > 0)
		address = check_mapping(line, region, &file, address);
	free(line);
	fclose(maps);
	return address && !contains(region, address) ? 0 : -EINVAL;
}

static int check_region(const struct irqrouter_region *region)
{
	int flags = fcntl(region->fd, F_GETFL);

	if (flags < 0)
		return -EBADF;
	if (!region->size || region->reserved || region->gpa + region->size - 1 < region->gpa ||
	    region->offset + region->size - 1 < region->offset || (flags & O_ACCMODE) == O_WRONLY)
		return -EINVAL;
	if (fcntl(region->fd, F_GET_SEALS) < 0) /* only shmem and hugetlbfs files have seals */
		return -EINVAL;
	return check_mapped(region);
}

static bool overlap(const struct irqrouter_region *a, const struct irqrouter_region *b)
{
	return a->gpa <= b->gpa + b->size - 1 && b->gpa <= a->gpa + a->size - 1;
}

static int check_regions(const struct irqrouter_region *regions, size_t count)
{
	size_t i, j;
	int error;

	if (!count)
		return -EINVAL;
	if (count > OPERATIONS_MAX)
		return -E2BIG;
	for (i = 0; i < count; i++) {
		error = check_region(&regions[i]);
		if (error)
			return error;
		for (j = 0; j < i; j++) {
			if (overlap(&regions[i], &regions[j]))
				return -EINVAL;
		}
	}
	return 0;
}

static void free_memory(struct memory *memory)
{
	while (memory->fd_count)
		close(memory->fds[--memory->fd_count]);
	free(memory->regions);
	*memory = (struct memory){0};
}

/* The index of the region's descriptor: one for each number we were given. */
static int descriptor_of(struct memory *memory, const struct irqrouter_region *regions, uint32_t i)
{
	uint32_t j;
	int fd;

	for (j = 0; j < i; j++) {
		if (regions[j].fd == regions[i].fd)
			return (int)memory->regions[j].descriptor;
	}
	if (memory->fd_count == DESCRIPTORS_MAX)
		return -E2BIG;
	fd = fcntl(regions[i].fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	memory->fds[memory->fd_count] = fd;
	return (int)memory->fd_count++;
}

static int copy_regions(struct memory *memory, const struct irqrouter_region *regions, size_t count)
{
	uint32_t i;

	*memory = (struct memory){.count = (uint32_t)count};
	memory->regions = calloc(count, sizeof(*memory->regions));
	if (!memory->regions)
		return -ENOMEM;
	for (i = 0; i < count; i++) {
		int descriptor = descriptor_of(memory, regions, i);

		if (descriptor < 0)
			return descriptor;
		memory->regions[i] = (struct wire_region){
			.gpa = regions[i].gpa,
			.size = regions[i].size,
			.offset = regions[i].offset,
			.descriptor = (uint32_t)descriptor,
		};
	}
	return 0;
}

/* Tell a service that is there. The lock is held, and given up meanwhile. */
static int tell_memory(struct irqrouter_agent *agent)
{
	struct request request = {.command = MEMORY};
	int64_t deadline = now_ns() + (agent->connection.breaker_open ? agent->deadline : SETUP_DEADLINE);
	int error = -ENOTCONN;

	while (agent->connection.state == READY && now_ns() < deadline) {
		error = send_memory(agent, &request);
		if (error != -EAGAIN)
			break;
		wait_for(agent, &agent->connected, now_ns() + MS);
	}
	if (request.sent)
		error = await_reply(agent, &request, deadline);
	if (error != -ENOTCONN && error != -ETIMEDOUT && error != -EAGAIN)
		return error;
	if (agent->connection.state != APART && agent->connection.memory_sent && !request.sent)
		break_connection(agent); /* it must not miss it */
	return 0;
}

int irqrouter_agent_set_memory(struct irqrouter_agent *agent, const struct irqrouter_region *regions, size_t count)
{
	struct memory memory, before;
	int error = check_regions(regions, count);

	if (error)
		return error;
	error = copy_regions(&memory, regions, count);
	if (error) {
		free_memory(&memory);
		return error;
	}
	turnstile_enter(&agent->memory_turn);
	lock(agent);
	before = agent->memory;
	agent->memory = memory;
	error = tell_memory(agent);
	if (error) {
		agent->memory = before;
		before = memory;
	}
	unlock(agent);
	turnstile_leave(&agent->memory_turn);
	free_memory(&before);
	return error;
}

/* ---- verbs: the VMM's own routes -------------------------------------------------------------------------------- */

/* `given`: by GSI, all false; afterwards, those that are named. */
static int check_foreign(const struct irqrouter_agent *agent, const struct irqrouter_route *routes, size_t count,
			 bool *given)
{
	size_t i;

	for (i = 0; i < count; i++) {
		uint32_t gsi = routes[i].gsi;

		if (gsi >= agent->routes.limit || agent->routes.by_gsi[gsi].owner || given[gsi])
			return -EINVAL;
		given[gsi] = true;
	}
	return 0;
}

static void want_foreign(struct irqrouter_agent *agent, const struct irqrouter_route *wanted, size_t count)
{
	struct routes *routes = &agent->routes;
	uint32_t gsi;
	size_t i;

	for (gsi = 0; gsi < routes->limit; gsi++) {
		if (routes->by_gsi[gsi].foreign)
			drop_route(routes, gsi);
	}
	for (i = 0; i < count; i++) {
		struct message message = {wanted[i].address, wanted[i].data};

		routes->by_gsi[wanted[i].gsi].foreign = true;
		want_route(routes, wanted[i].gsi, &message);
	}
}

/* Those that were dropped become free only when KVM has answered: it may refuse, and then they are wanted again. */
static void free_foreign(struct irqrouter_agent *agent)
{
	struct routes *routes = &agent->routes;
	uint32_t gsi;

	for (gsi = 0; gsi < routes->limit; gsi++) {
		struct route *route = &routes->by_gsi[gsi];

		if (!route->foreign || route->want)
			continue;
		route->foreign = false;
		if (gsi >= routes->first)
			free_gsi(routes, gsi);
	}
}

static size_t copy_foreign(const struct irqrouter_agent *agent, struct irqrouter_route *out)
{
	const struct routes *routes = &agent->routes;
	size_t count = 0;
	uint32_t gsi;

	for (gsi = 0; gsi < routes->limit; gsi++) {
		const struct route *route = &routes->by_gsi[gsi];

		if (route->foreign)
			out[count++] = (struct irqrouter_route){gsi, route->wanted.data, route->wanted.address};
	}
	return count;
}

/* The writers' lock is held throughout: else another thread's write takes them along, and is told what was refused. */
static int replace_foreign(struct irqrouter_agent *agent, const struct irqrouter_route *routes, size_t count,
			   struct irqrouter_route *before, bool *given)
{
	size_t before_count;
	int error;

	lock(agent);
	error = check_foreign(agent, routes, count, given);
	if (!error) {
		before_count = copy_foreign(agent, before);
		want_foreign(agent, routes, count);
	}
	unlock(agent);
	if (error)
		return error;
	error = write_changes(agent);
	lock(agent);
	if (error)
		want_foreign(agent, before, before_count);
	free_foreign(agent);
	unlock(agent);
	return error;
}

int irqrouter_agent_set_foreign_routes(struct irqrouter_agent *agent, const struct irqrouter_route *routes,
				       size_t count)
{
	struct irqrouter_route *before = calloc(agent->routes.limit, sizeof(*before));
	bool *given = calloc(agent->routes.limit, sizeof(*given));
	int error = -ENOMEM;

	if (before && given) {
		turnstile_enter(&agent->writing);
		error = replace_foreign(agent, routes, count, before, given);
		turnstile_leave(&agent->writing);
	}
	free(before);
	free(given);
	return error;
}

/* ---- verbs: level lines ----------------------------------------------------------------------------------------- */

static bool end_service(struct irqrouter_agent *agent, struct vector *vector, uint32_t guest_vector)
{
	if (!vector->level || !vector->in_service || vector->in_service_vector != guest_vector)
		return false;
	vector->in_service = false;
	if (vector->resample_fd >= 0)
		eventfd_write(vector->resample_fd, 1);
	if (vector->prepared && vector->state == DEASSIGNED && arm(agent, vector))
		fail_prepared(agent, vector, ENOSPC); /* of watches; the service watches it then */
	return true;
}

int irqrouter_agent_eoi(struct irqrouter_agent *agent, uint32_t guest_vector)
{
	uint32_t number;
	int count = 0;

	lock(agent);
	for (number = 0; number < agent->slots_used && agent->level_count; number++) {
		struct vector *vector = find(agent, number);

		count += vector && end_service(agent, vector, guest_vector);
	}
	if (count)
		ring(agent);
	unlock(agent);
	return count;
}

/* ---- verbs: looking --------------------------------------------------------------------------------------------- */

static void describe(const struct irqrouter_agent *agent, const struct vector *vector, struct irqrouter_status *out)
{
	const struct route *route = &agent->routes.by_gsi[vector->gsi];

	*out = (struct irqrouter_status){
		.vector = {vector->number, vector->born},
		.generation = vector->generation,
		.address = vector->message.address,
		.data = vector->message.data,
		.requester = vector->requester,
		.cookie = vector->cookie,
		.gsi = vector->gsi,
		.state = vector->state,
		.prepared = vector->prepared,
		.refused = vector->refused,
		.routed = route->have,
		.route_address = route->have ? route->accepted.address : 0,
		.route_data = route->have ? route->accepted.data : 0,
		.invalidations = vector->invalidations,
		.caught = vector->caught,
		.faults = vector->faults,
		.stale = vector->stale,
		.discarded = vector->discarded,
		.last_catch_ns = vector->last_catch_ns,
		.last_catch_at_ns = (uint64_t)vector->last_catch_at,
	};
}

int irqrouter_agent_status(struct irqrouter_agent *agent, const struct irqrouter_vector *handle,
			   struct irqrouter_status *out)
{
	const struct vector *vector;

	lock(agent);
	vector = known(agent, handle);
	if (vector)
		describe(agent, vector, out);
	unlock(agent);
	return vector ? 0 : -ENOENT;
}

int irqrouter_agent_vectors(struct irqrouter_agent *agent, struct irqrouter_vector *out, size_t count)
{
	uint32_t number;
	size_t found = 0;

	lock(agent);
	for (number = 0; number < agent->slots_used; number++) {
		struct vector *vector = find(agent, number);

		if (vector && found < count)
			out[found] = (struct irqrouter_vector){vector->number, vector->born};
		found += vector != NULL;
	}
	unlock(agent);
	return (int)found;
}

int irqrouter_agent_stats(struct irqrouter_agent *agent, struct irqrouter_stats *out, size_t size)
{
	struct irqrouter_stats stats;

	lock(agent);
	stats = agent->stats;
	stats.vectors = agent->vector_count;
	stats.connected = agent->connection.state == READY;
	stats.breaker_open = agent->connection.breaker_open;
	unlock(agent);
	memset(out, 0, size);
	memcpy(out, &stats, size < sizeof(stats) ? size : sizeof(stats));
	return 0;
}

int irqrouter_agent_connected(struct irqrouter_agent *agent)
{
	bool ready;

	lock(agent);
	ready = agent->connection.state == READY;
	unlock(agent);
	return ready;
}

int irqrouter_agent_wait_connected(struct irqrouter_agent *agent, uint32_t timeout_ms)
{
	int64_t deadline = now_ns() + timeout_ms * MS;
	bool ready;

	lock(agent);
	while (agent->connection.state != READY && now_ns() < deadline)
		wait_for(agent, &agent->connected, deadline);
	ready = agent->connection.state == READY;
	unlock(agent);
	return ready ? 0 : -ETIMEDOUT;
}

/* ---- making and ending ------------------------------------------------------------------------------------------ */

static bool is_name(const char *name)
{
	size_t length = name ? strlen(name) : 0;

	return length >= 1 && length <= 63 &&
	       strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == length;
}

/* A shorter struct gets the defaults, which are 0; a longer one must not ask for anything that we do not know. */
static int copy_options(const struct irqrouter_options *given, struct irqrouter_options *options)
{
	const char *bytes = (const char *)given;
	size_t i;

	if (given->size < offsetof(struct irqrouter_options, routes_max))
		return -EINVAL;
	for (i = sizeof(*options); i < given->size; i++) {
		if (bytes[i])
			return -E2BIG;
	}
	memset(options, 0, sizeof(*options));
	memcpy(options, given, given->size < sizeof(*options) ? given->size : sizeof(*options));
	return 0;
}

static int check_options(const struct irqrouter_options *options)
{
	uint32_t width = options->host_address_width;
	bool vtd = options->remapper == IRQROUTER_REMAPPER_VTD;

	if (!options->socket_path || !*options->socket_path || !is_name(options->name))
		return -EINVAL;
	if (strlen(options->socket_path) >= sizeof(((struct sockaddr_un *)0)->sun_path))
		return -ENAMETOOLONG;
	if (options->remapper > IRQROUTER_REMAPPER_VMM || options->slots > SLOTS_MAX ||
	    (vtd ? width < 12 || width > 64 : width != 0))
		return -EINVAL;
	if (options->remapper == IRQROUTER_REMAPPER_VMM && !options->translate)
		return -EINVAL;
	return 0;
}

static int adopt_vm(struct irqrouter_agent *agent, int vm_fd)
{
	char path[48], target[64];
	ssize_t length;

	agent->vm_fd = fcntl(vm_fd, F_DUPFD_CLOEXEC, 0);
	if (agent->vm_fd < 0)
		return errno == EBADF ? -EINVAL : -errno;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", agent->vm_fd);
	length = readlink(path, target, sizeof(target) - 1);
	target[length > 0 ? length : 0] = 0;
	return strcmp(target, "anon_inode:kvm-vm") ? -EINVAL : 0;
}

static int count_routes(struct irqrouter_agent *agent, const struct irqrouter_options *options)
{
	int count = ioctl(agent->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_IRQ_ROUTING);

	if (count <= 0 || ioctl(agent->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_IRQFD) <= 0 ||
	    ioctl(agent->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_SIGNAL_MSI) <= 0)
		return -EOPNOTSUPP;
	if (options->routes_max > (uint32_t)count || options->pins > (uint32_t)count)
		return -EINVAL;
	agent->routes.first = agent->routes.maybe_free = options->pins;
	agent->routes.limit = options->routes_max ? options->routes_max : (uint32_t)count;
	return 0;
}

static int allocate_tables(struct irqrouter_agent *agent)
{
	struct routes *routes = &agent->routes;

	routes->by_gsi = calloc(routes->limit, sizeof(*routes->by_gsi));
	routes->changed = calloc(routes->limit, sizeof(*routes->changed));
	routes->changes = calloc(routes->limit, sizeof(*routes->changes));
	routes->image = calloc(1, sizeof(*routes->image) + routes->limit * sizeof(*routes->image->entries));
	agent->vectors = calloc(agent->slots, sizeof(*agent->vectors));
	agent->identities = calloc(agent->slots, sizeof(*agent->identities));
	agent->free_slots = calloc(agent->slots, sizeof(*agent->free_slots));
	agent->by_cookie = calloc(IRQROUTER_UNINDEXED + 1, sizeof(*agent->by_cookie));
	agent->turn = calloc(agent->slots, sizeof(*agent->turn));
	agent->frame = malloc(FRAME_MAX);
	agent->reply = malloc(FRAME_MAX);
	agent->errnos = calloc(OPERATIONS_MAX, sizeof(*agent->errnos));
	agent->pool = make_scratch(agent->slots);
	if (!routes->by_gsi || !routes->changed || !routes->changes || !routes->image || !agent->vectors ||
	    !agent->identities || !agent->free_slots || !agent->by_cookie || !agent->turn || !agent->frame ||
	    !agent->reply || !agent->errnos || !agent->pool)
		return -ENOMEM;
	return 0;
}

static int open_epoll(struct irqrouter_agent *agent)
{
	struct epoll_event wake = {.events = EPOLLIN, .data.u64 = FROM_WAKE};
	struct epoll_event bell = {.events = EPOLLIN, .data.u64 = FROM_BELL};

	agent->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	agent->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	agent->bell_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (agent->epoll_fd < 0 || agent->wake_fd < 0 || agent->bell_fd < 0 ||
	    epoll_ctl(agent->epoll_fd, EPOLL_CTL_ADD, agent->wake_fd, &wake) ||
	    epoll_ctl(agent->epoll_fd, EPOLL_CTL_ADD, agent->bell_fd, &bell))
		return -errno;
	return 0;
}

/* With every signal blocked: they are for the VMM's threads. */
static int start_thread(struct irqrouter_agent *agent)
{
	sigset_t all, before;
	int error;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&agent->thread, NULL, agent_main, agent);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		pthread_setname_np(agent->thread, "irqrouter");
	return -error;
}

static void free_agent(struct irqrouter_agent *agent)
{
	struct routes *routes = &agent->routes;

	while (agent->pool) {
		struct scratch *scratch = agent->pool;

		agent->pool = scratch->next;
		free_scratch(scratch);
	}
	free_memory(&agent->memory);
	close_fd(&agent->vm_fd);
	close_fd(&agent->epoll_fd);
	close_fd(&agent->wake_fd);
	close_fd(&agent->bell_fd);
	free(routes->by_gsi);
	free(routes->changed);
	free(routes->changes);
	free(routes->image);
	free(agent->vectors);
	free(agent->identities);
	free(agent->free_slots);
	free(agent->by_cookie);
	free(agent->turn);
	free(agent->frame);
	free(agent->reply);
	free(agent->errnos);
	free(agent);
}

static void set_options(struct irqrouter_agent *agent, const struct irqrouter_options *options)
{
	agent->options = *options;
	agent->slots = options->slots ? options->slots : SLOTS_MAX;
	agent->few = options->few ? options->few : 4;
	agent->deadline = (options->deadline_ms ? options->deadline_ms : 50) * MS;
	agent->remapper = options->remapper;
	agent->host_address_width = options->host_address_width;
	agent->address.sun_family = AF_UNIX;
	strcpy(agent->address.sun_path, options->socket_path); /* check_options() saw that it fits */
	strcpy(agent->name, options->name);
	agent->options.socket_path = agent->options.name = NULL; /* the caller's */
}

int irqrouter_agent_create(const struct irqrouter_options *given, struct irqrouter_agent **out)
{
	struct irqrouter_options options;
	struct irqrouter_agent *agent;
	int error = copy_options(given, &options);

	if (!error)
		error = check_options(&options);
	if (error)
		return error;
	agent = calloc(1, sizeof(*agent));
	if (!agent)
		return -ENOMEM;
	agent->epoll_fd = agent->wake_fd = agent->bell_fd = -1;
	agent->connection.request_fd = agent->connection.batch_fd = agent->connection.doorbell_fd = -1;
	agent->deassigning_end = &agent->deassigning;
	agent->back_off = BACK_OFF_MIN;
	set_options(agent, &options);
	error = adopt_vm(agent, options.vm_fd);
	if (!error)
		error = count_routes(agent, &options);
	if (!error)
		error = allocate_tables(agent);
	if (!error)
		error = open_epoll(agent);
	if (!error)
		error = start_thread(agent);
	if (error) {
		free_agent(agent);
		return error;
	}
	*out = agent;
	return 0;
}

static void remove_every_vector(struct irqrouter_agent *agent)
{
	struct irqrouter_vector *handles = calloc(agent->slots, sizeof(*handles));
	int count;

	if (handles) {
		count = irqrouter_agent_vectors(agent, handles, agent->slots);
		remove_all(agent, handles, (size_t)count);
		free(handles);
		return;
	}
	for (uint32_t number = 0; number < agent->slots_used; number++) { /* one by one, then */
		struct irqrouter_vector handle = {number, agent->vectors[number].born};

		remove_all(agent, &handle, 1);
	}
}

void irqrouter_agent_destroy(struct irqrouter_agent *agent)
{
	if (!agent)
		return;
	lock(agent);
	agent->closing = true;
	unlock(agent);
	wake_agent(agent);
	pthread_join(agent->thread, NULL);
	remove_every_vector(agent);
	free_agent(agent);
}
