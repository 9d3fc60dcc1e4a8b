/* SPDX-License-Identifier: MIT */
/*
 * irqrouter_agent: the part of irqrouter that lives inside a VMM.
 *
 * KVM obeys only the process that made the VM. So the agent owns the VM's routing table and the eventfds of its
 * interrupts, and acts; the service, `irqrouter serve`, reads the guest's remapping tables, and decides. What goes
 * between the two is docs/protocol.md. Without a service everything stays correct: what KVM delivers goes on being
 * delivered, invalidations take irqfds away, and the events of vectors without one wait in their eventfds.
 *
 * Every function returns 0 or a positive number, or -errno. Unless it says otherwise a function may be called from any
 * thread, vCPU threads among them, at any time between create and destroy. What a verb says is true when it returns.
 *
 * The VM must have a split irqchip (KVM_CAP_SPLIT_IRQCHIP) and 32-bit x2APIC ids (KVM_CAP_X2APIC_API).
 */
#ifndef IRQROUTER_AGENT_H
#define IRQROUTER_AGENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IRQROUTER_API __attribute__((visibility("default")))

struct irqrouter_agent;

/* Names one vector, for ever: a handle whose vector was removed never reaches the next one in its slot (-ENOENT). */
struct irqrouter_vector {
	uint32_t number;
	uint64_t born;
};

/* Whose interrupt remapping the guest sees. */
enum irqrouter_remapper {
	IRQROUTER_REMAPPER_NONE = 0,
	IRQROUTER_REMAPPER_VTD = 1,
	IRQROUTER_REMAPPER_AMDVI = 2,
	IRQROUTER_REMAPPER_VMM = 3, /* the VMM translates: options.translate */
};

/* Carried by a vector that only a global invalidation touches; the highest cookie. */
#define IRQROUTER_UNINDEXED 0x10000u

/* What options.translate found. */
enum irqrouter_outcome {
	IRQROUTER_MESSAGE = 0, /* deliver `address`, `data` */
	IRQROUTER_FAULT = 1,   /* blocked; `low`, `high` is the record, which on_fault gets if that blocks an event */
};

struct irqrouter_translation {
	uint64_t address;
	uint32_t data;
	uint64_t low;
	uint64_t high;
};

struct irqrouter_options {
	/* sizeof(struct irqrouter_options): a caller built against a shorter one gets the defaults for the rest. */
	size_t size;
	/* The service's listening socket. Copied. */
	const char *socket_path;
	/* The VM's name: 1 to 63 of A-Z a-z 0-9 . _ - and unique on the service. Copied. */
	const char *name;
	/* The VM. Duplicated; stays the caller's. */
	int vm_fd;
	/* GSIs below this are I/OAPIC pins and the VMM's own (KVM_CAP_SPLIT_IRQCHIP's argument). */
	uint32_t pins;
	/* How many GSIs there are; 0: ask KVM (KVM_CAP_IRQ_ROUTING). */
	uint32_t routes_max;
	/* The most vectors at a time, 1 to 4096; 0: 4096. */
	uint32_t slots;
	/* enum irqrouter_remapper */
	uint32_t remapper;
	/* VT-d: as the DMAR table tells the guest, 12 to 64; otherwise 0. */
	uint32_t host_address_width;
	/* How long a wide invalidation may wait for the service, in ms; 0: 50. */
	uint32_t deadline_ms;
	/* An invalidation that takes up to this many irqfds away does so itself, without the service; 0: 4. */
	uint32_t few;
	/* Passed to each callback. */
	void *opaque;
	/*
	 * A fault to be put where the VMM keeps them, as hardware would write it. Called with the agent's lock held,
	 * before the event is consumed, on any thread: it must only store, and call nothing of the agent. May be NULL.
	 */
	void (*on_fault)(void *opaque, const struct irqrouter_vector *vector, uint64_t low, uint64_t high);
	/*
	 * IRQROUTER_REMAPPER_VMM: look at the tables now, record nothing. Returns enum irqrouter_outcome; below 0: not
	 * now, and the service asks again. Called on the agent's thread, without a lock; it must not wait for a vCPU.
	 */
	int (*translate)(void *opaque, const struct irqrouter_vector *vector, uint64_t address, uint32_t data,
			 uint16_t requester, struct irqrouter_translation *out);
	/* A line for the VMM's log, without a newline. Called on the agent's thread, without a lock. May be NULL. */
	void (*log)(void *opaque, const char *text);
};

/*
 * Make an agent. Its thread connects to the service in the background, and again whenever the connection ends, for
 * ever. -EINVAL: an option is wrong, or vm_fd is no VM. -E2BIG: an option is set that this library does not know.
 * -ENAMETOOLONG: socket_path. -EOPNOTSUPP: KVM lacks something. -ENOMEM, -EMFILE and what pthread_create says.
 *
 * KVM cannot be asked for a VM's routes: the table is taken to be empty. The first write replaces what the VMM may have
 * put there; from now on its own routes go in through irqrouter_agent_set_foreign_routes().
 */
IRQROUTER_API int irqrouter_agent_create(const struct irqrouter_options *options, struct irqrouter_agent **out);

/*
 * Remove every vector, leave the VMM's own routes, end the thread, free everything. No other call may be under way or
 * come later. NULL is ignored.
 */
IRQROUTER_API void irqrouter_agent_destroy(struct irqrouter_agent *agent);

/* Wait until the service knows everything; 0, or -ETIMEDOUT after `timeout_ms`. */
IRQROUTER_API int irqrouter_agent_wait_connected(struct irqrouter_agent *agent, uint32_t timeout_ms);

/* 1 while the service knows everything, else 0. */
IRQROUTER_API int irqrouter_agent_connected(struct irqrouter_agent *agent);

struct irqrouter_region {
	uint64_t gpa;
	uint64_t size;       /* bytes */
	uint64_t offset;     /* in the file */
	void *host_address;  /* where the VMM has mapped it, to be checked; NULL: not checked */
	int fd;              /* a memfd, or another shmem or hugetlbfs file. Duplicated; stays the caller's. */
	uint32_t reserved;   /* 0 */
};

/*
 * Guest memory, whole: replaces what was said before. Waits up to 2 s for the service if there is one; if that does not
 * answer in time, or there is none, it is told later. Not for vCPU threads.
 *
 * -EINVAL: no region, an empty one, one that wraps or overlaps, a descriptor of another kind; memory at `host_address`
 * that is not mapped, or MAP_PRIVATE (what the guest writes never reaches the file), or of another file or offset.
 * -EBADF. -E2BIG: more than 2047 regions or 240 descriptors. What the service says: -EINVAL, -EDQUOT. Nothing has
 * changed then.
 */
IRQROUTER_API int irqrouter_agent_set_memory(struct irqrouter_agent *agent, const struct irqrouter_region *regions,
					     size_t count);

/*
 * The unit's registers, as the guest has made them. VT-d: `table` is IRTA as SIRTP latched it, `control` bit 0
 * GSTS.IRES and bit 1 GSTS.CFIS. AMD-Vi: the Device Table Base Address and Control registers. Invalidates everything,
 * and like irqrouter_agent_invalidate() must have returned before the guest may see the change; returns what that does.
 */
IRQROUTER_API int irqrouter_agent_set_registers(struct irqrouter_agent *agent, uint64_t table, uint64_t control);

/* Flags of a source. */
#define IRQROUTER_MASKED (1u << 0)
/*
 * A level line: never bound to an irqfd, which would inject an edge again and again. After an event was delivered the
 * next one waits until irqrouter_agent_eoi() for the guest vector it went to; that signals `resample`, upon which the
 * device signals again if its line is still up.
 */
#define IRQROUTER_LEVEL (1u << 1)

struct irqrouter_source {
	/* With EFD_NONBLOCK and without EFD_SEMAPHORE. Duplicated; stays the caller's. */
	int eventfd;
	/* IRQROUTER_LEVEL: an eventfd, duplicated; -1: none. Otherwise ignored. */
	int resample;
	/* The MSI the guest gave the device. */
	uint64_t address;
	uint32_t data;
	/* The device's requester id, 16 bits. */
	uint32_t requester;
	uint32_t flags;
	/* IRQROUTER_REMAPPER_VMM: what an invalidation names, up to IRQROUTER_UNINDEXED. Otherwise ignored. */
	uint32_t cookie;
};

/*
 * Add vectors: all, or none. Each whose message translates has its irqfd when this returns, with one write of the
 * routing table for all; without a service they are added deassigned, and wait for one (up to 2 s, if it is there but
 * does not answer). Not for vCPU threads that must not wait.
 *
 * -EINVAL: a field is wrong; not an eventfd, blocking, or made with EFD_SEMAPHORE. -EBADF. -EEXIST: an eventfd is a
 * vector of this VM already, or named twice. -EBUSY: it has an irqfd that is not ours, or is a vector of another VM.
 * -ENOSPC: no slot or GSI is left. -ENOSYS: the kernel's fdinfo lacks "eventfd-id" or "eventfd-semaphore". -EMFILE,
 * -ENOMEM; what the service says (-EDQUOT), and what KVM says (-EIO: the VM belongs to another process).
 */
IRQROUTER_API int irqrouter_agent_add(struct irqrouter_agent *agent, const struct irqrouter_source *sources,
				      size_t count, struct irqrouter_vector *out);

/*
 * The guest gave the vector another message. Its next event is translated afresh. `cookie` as in irqrouter_source.
 * -ENOENT: the vector was removed. -EINVAL. Like all that follow: what KVM said to a deassign that failed.
 */
IRQROUTER_API int irqrouter_agent_program(struct irqrouter_agent *agent, const struct irqrouter_vector *vector,
					  uint64_t address, uint32_t data, uint32_t cookie);

/* From now on its events wait in its eventfd, as in a pending bit. -ENOENT. */
IRQROUTER_API int irqrouter_agent_mask(struct irqrouter_agent *agent, const struct irqrouter_vector *vector);

/* What waited, or comes next, goes through a fresh translation. -ENOENT. */
IRQROUTER_API int irqrouter_agent_unmask(struct irqrouter_agent *agent, const struct irqrouter_vector *vector);

/*
 * When this returns KVM knows nothing of them; what is pending stays in your eventfds. -ENOENT: one of them was removed
 * before, and none is now. Another error: they are gone, but KVM refused to let an irqfd go; its GSI is not used again.
 */
IRQROUTER_API int irqrouter_agent_remove(struct irqrouter_agent *agent, const struct irqrouter_vector *vectors,
					 size_t count);

/*
 * The guest's remapping unit drops every translation made for the cookies `first` to `last` (both included; VT-d: IRTE
 * indices, AMD-Vi: requester ids; 0 to IRQROUTER_UNINDEXED: global). Returns how many vectors that touched.
 *
 * Only when this has returned may the guest be told that its invalidation is complete: no event signalled afterwards is
 * then delivered by a translation read before. For vCPU threads. Takes what KVM needs to take irqfds away (some
 * 15 µs to 90 µs for each; at times several ms, and as KVM's work queue is the host's, another VM's trouble can make
 * it longer), and at most the deadline where there are many.
 */
IRQROUTER_API int irqrouter_agent_invalidate(struct irqrouter_agent *agent, uint32_t first, uint32_t last);

/* The same, measured: `*ns` is how long it took, `*waited_ns` how much of that it waited for the service. */
IRQROUTER_API int irqrouter_agent_invalidate_timed(struct irqrouter_agent *agent, uint32_t first, uint32_t last,
						   uint64_t *ns, uint64_t *waited_ns);

struct irqrouter_route {
	uint32_t gsi;
	uint32_t data;
	uint64_t address; /* high dword as KVM takes it: destination bits 31:8 in its bits 31:8 */
};

/*
 * Replace the VMM's own routes, those of I/OAPIC pins for example: all, or none. A VMM that writes the table behind the
 * agent's back erases live routes, and events with them. -EINVAL: a GSI twice, too high, or a vector's; what KVM says.
 */
IRQROUTER_API int irqrouter_agent_set_foreign_routes(struct irqrouter_agent *agent,
						     const struct irqrouter_route *routes, size_t count);

/* To be called on KVM_EXIT_IOAPIC_EOI, by the vCPU's thread: see IRQROUTER_LEVEL. Returns for how many lines it was. */
IRQROUTER_API int irqrouter_agent_eoi(struct irqrouter_agent *agent, uint32_t guest_vector);

enum irqrouter_state {
	IRQROUTER_DEASSIGNED = 1, /* events wait for the service, or a decision of its that stands */
	IRQROUTER_ASSIGNED = 2,   /* KVM delivers */
	IRQROUTER_STATE_MASKED = 3,
};

struct irqrouter_status {
	struct irqrouter_vector vector;
	uint64_t generation;
	uint64_t address; /* what the guest gave the device */
	uint32_t data;
	uint32_t requester;
	uint32_t cookie;
	uint32_t gsi;
	uint32_t state;    /* enum irqrouter_state */
	uint32_t prepared; /* 1: the next event is served without the service */
	uint32_t refused;  /* the errno with which KVM refused this generation's route, delivery or irqfd; 0 */
	uint32_t routed;   /* 1: `route_address`, `route_data` is in the table that KVM last accepted */
	uint64_t route_address;
	uint32_t route_data;
	uint32_t invalidations;
	uint32_t caught; /* events taken and delivered by the agent */
	uint32_t faults; /* events taken and blocked */
	uint32_t stale;  /* decisions that came too late */
	uint32_t discarded;
	uint32_t last_catch_ns;
	uint32_t reserved;
	uint64_t last_catch_at_ns; /* when (CLOCK_MONOTONIC) the last of `caught` had been delivered; 0: never */
};

/* -ENOENT */
IRQROUTER_API int irqrouter_agent_status(struct irqrouter_agent *agent, const struct irqrouter_vector *vector,
					 struct irqrouter_status *out);

/* Fills in up to `count` handles, in the order of their numbers; returns how many vectors there are. */
IRQROUTER_API int irqrouter_agent_vectors(struct irqrouter_agent *agent, struct irqrouter_vector *out, size_t count);

struct irqrouter_stats {
	uint64_t vectors;
	uint64_t connected;    /* 0 or 1 */
	uint64_t breaker_open; /* 1: a deadline passed, and the service has not answered a PING since */
	uint64_t connections;  /* how often the service came to know everything */
	uint64_t wide;         /* invalidations for which the service was asked */
	uint64_t wide_served;  /* those it answered in time */
	uint64_t fallbacks;    /* invalidations that were many, and were made without the service */
	uint64_t timeouts;     /* replies that did not come in time */
	uint64_t late;         /* and came then; none was carried out */
	uint64_t malformed;    /* frames for which the connection was ended */
	uint64_t batches;      /* BATCH frames carried out */
	uint64_t table_writes; /* KVM_SET_GSI_ROUTING */
	uint64_t assigns;      /* KVM_IRQFD */
	uint64_t deassigns;    /* KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN */
	uint64_t wakeups;      /* how often the eventfd of a prepared vector woke the agent */
	uint64_t starved;      /* invalidations that waited for a vector which kept losing the race */
	uint64_t longest_wait_ns; /* the longest that an invalidation waited for the service */
};

/* `size`: sizeof(struct irqrouter_stats). Fills in as much as both know. */
IRQROUTER_API int irqrouter_agent_stats(struct irqrouter_agent *agent, struct irqrouter_stats *out, size_t size);

#ifdef __cplusplus
}
#endif

#endif
