/*
 * The floor: what the kernel alone costs. Each function makes the system calls that no implementation can do without
 * and takes the time itself, with CLOCK_MONOTONIC, the clock of Python's time.perf_counter_ns(). They are called with
 * the GIL released. A negative result is an errno.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void idle(int64_t ns)
{
	struct timespec t = { .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };

	while (nanosleep(&t, &t) < 0 && errno == EINTR)
		;
}

static int set_irqfd(int vm, int eventfd, uint32_t gsi, uint32_t flags)
{
	struct kvm_irqfd irqfd = { .fd = eventfd, .gsi = gsi, .flags = flags };

	return ioctl(vm, KVM_IRQFD, &irqfd);
}

static int signal_msi(int vm, uint64_t address, uint32_t data)
{
	struct kvm_msi msi = { .address_lo = (uint32_t)address, .address_hi = address >> 32, .data = data };

	return ioctl(vm, KVM_SIGNAL_MSI, &msi);
}

/* steady: ns for signalling `eventfd` `count` times. */
int64_t signal_many(int eventfd, uint32_t count)
{
	const uint64_t one = 1;
	int64_t start = now();

	for (uint32_t i = 0; i < count; i++)
		if (write(eventfd, &one, sizeof(one)) < 0)
			return -errno;
	return now() - start;
}

/* selective: ns for deassigning one irqfd. */
int64_t deassign(int vm, int eventfd, uint32_t gsi)
{
	int64_t start = now();

	if (set_irqfd(vm, eventfd, gsi, KVM_IRQFD_FLAG_DEASSIGN) < 0)
		return -errno;
	return now() - start;
}

/* selective, untimed: an event on a deassigned irqfd is caught and delivered, the table written, the irqfd assigned. */
int64_t catch_and_assign(int vm, int eventfd, uint32_t gsi, uint64_t address, uint32_t data,
			 const struct kvm_irq_routing *table)
{
	uint64_t count = 1;

	if (write(eventfd, &count, sizeof(count)) < 0 || read(eventfd, &count, sizeof(count)) < 0 ||
	    signal_msi(vm, address, data) < 0 || ioctl(vm, KVM_SET_GSI_ROUTING, table) < 0 ||
	    set_irqfd(vm, eventfd, gsi, 0) < 0)
		return -errno;
	if (read(eventfd, &count, sizeof(count)) < 0 && errno != EAGAIN)
		return -errno;
	return 0;
}

/* selective, the peer: ns for writing the whole table twice, as QEMU does for each descriptor (MSIs, then pins). */
int64_t write_table_twice(int vm, const struct kvm_irq_routing *table)
{
	int64_t start = now();

	if (ioctl(vm, KVM_SET_GSI_ROUTING, table) < 0 || ioctl(vm, KVM_SET_GSI_ROUTING, table) < 0)
		return -errno;
	return now() - start;
}

/* attach: ns for writing the table and assigning `count` irqfds, from `gsi` on; what is pending is discarded. */
int64_t attach(int vm, const int *eventfds, uint32_t count, uint32_t gsi, const struct kvm_irq_routing *table)
{
	int64_t start = now();
	uint64_t pending;

	if (ioctl(vm, KVM_SET_GSI_ROUTING, table) < 0)
		return -errno;
	for (uint32_t i = 0; i < count; i++) {
		if (set_irqfd(vm, eventfds[i], gsi + i, 0) < 0)
			return -errno;
		if (read(eventfds[i], &pending, sizeof(pending)) < 0 && errno != EAGAIN)
			return -errno;
	}
	return now() - start;
}

/* attach, untimed: deassigns them. */
int64_t detach(int vm, const int *eventfds, uint32_t count, uint32_t gsi)
{
	for (uint32_t i = 0; i < count; i++)
		if (set_irqfd(vm, eventfds[i], gsi + i, KVM_IRQFD_FLAG_DEASSIGN) < 0)
			return -errno;
	return 0;
}

/* miss: idle, signal `eventfd`, idle again; the time just before the signal. */
int64_t fire(int eventfd, int64_t idle_ns)
{
	const uint64_t one = 1;
	int64_t start;

	idle(idle_ns);
	start = now();
	if (write(eventfd, &one, sizeof(one)) < 0)
		return -errno;
	idle(idle_ns);
	return start;
}

/* miss: a thread that waits for an eventfd, reads it and signals the MSI. */
struct catcher {
	pthread_t thread;
	int vm, epoll, eventfd, stop;
	uint64_t address;
	uint32_t data;
	int64_t injected; /* when, or a negative errno */
};

static void *catch_events(void *argument)
{
	struct catcher *catcher = argument;
	struct epoll_event event;
	uint64_t count;

	for (;;) {
		if (epoll_wait(catcher->epoll, &event, 1, -1) < 0) {
			if (errno == EINTR)
				continue;
			break;
		}
		if (event.data.fd == catcher->stop)
			return NULL;
		if (read(catcher->eventfd, &count, sizeof(count)) < 0 ||
		    signal_msi(catcher->vm, catcher->address,
			       __atomic_load_n(&catcher->data, __ATOMIC_ACQUIRE)) < 0)
			break;
		__atomic_store_n(&catcher->injected, now(), __ATOMIC_RELEASE);
	}
	__atomic_store_n(&catcher->injected, -(int64_t)errno, __ATOMIC_RELEASE);
	return NULL;
}

static int watch(int epoll, int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void catcher_free(struct catcher *catcher)
{
	close(catcher->epoll);
	close(catcher->stop);
	free(catcher);
}

/* NULL when it could not be started. */
struct catcher *catcher_start(int vm, int eventfd_, uint64_t address)
{
	struct catcher *catcher = calloc(1, sizeof(*catcher));

	if (!catcher)
		return NULL;
	catcher->vm = vm;
	catcher->eventfd = eventfd_;
	catcher->address = address;
	catcher->epoll = epoll_create1(EPOLL_CLOEXEC);
	catcher->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (catcher->epoll < 0 || catcher->stop < 0 || watch(catcher->epoll, eventfd_) < 0 ||
	    watch(catcher->epoll, catcher->stop) < 0 ||
	    pthread_create(&catcher->thread, NULL, catch_events, catcher) != 0) {
		catcher_free(catcher);
		return NULL;
	}
	return catcher;
}

/* The data of the MSI for the next event. */
void catcher_set_data(struct catcher *catcher, uint32_t data)
{
	__atomic_store_n(&catcher->data, data, __ATOMIC_RELEASE);
}

/* When the last MSI had been signalled; 0 before the first. */
int64_t catcher_injected(const struct catcher *catcher)
{
	return __atomic_load_n(&catcher->injected, __ATOMIC_ACQUIRE);
}

void catcher_stop(struct catcher *catcher)
{
	const uint64_t one = 1;

	if (write(catcher->stop, &one, sizeof(one)) == sizeof(one))
		pthread_join(catcher->thread, NULL);
	catcher_free(catcher);
}
