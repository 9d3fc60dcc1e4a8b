/* SPDX-License-Identifier: MIT */
/*
 * Many threads at one agent at once, for the sanitizers: devices fire, vCPUs invalidate one entry, a few and all,
 * mask, program, remove and add; somebody looks on. It needs a service, that may come and go.
 *
 *   hammer SOCKET SECONDS
 */
#define _GNU_SOURCE
#include "irqrouter_agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define VECTORS 48
#define TABLE 0x1000u
#define RAM_SIZE (1u << 20)

static struct irqrouter_agent *agent;
static struct irqrouter_vector vectors[VECTORS];
static int eventfds[VECTORS];
static uint64_t *entries;
static atomic_bool stopping;
static atomic_uint faults;
static atomic_uint done[8];

static void must(long result, const char *what)
{
	if (result >= 0)
		return;
	fprintf(stderr, "%s: %s\n", what, strerror(result == -1 ? errno : (int)-result));
	exit(1);
}

static void record(void *opaque, const struct irqrouter_vector *vector, uint64_t low, uint64_t high)
{
	(void)opaque, (void)vector, (void)low, (void)high;
	faults++;
}

static uint32_t next(uint32_t *seed)
{
	*seed = *seed * 1664525u + 1013904223u;
	return *seed >> 8;
}

static void write_entry(uint32_t index, uint32_t *seed)
{
	uint64_t present = next(seed) % 16 != 0, vector = 0x30 + next(seed) % 100, cpu = next(seed) % 2;

	__atomic_store_n(&entries[2 * index], present | vector << 16 | cpu << 40, __ATOMIC_RELEASE);
}

static struct irqrouter_source source_of(uint32_t index)
{
	return (struct irqrouter_source){
		.eventfd = eventfds[index], .resample = -1, .address = 0xfee00010u | index << 5, .requester = 0x18};
}

static void *fire(void *unused)
{
	uint32_t seed = 1;

	(void)unused;
	while (!stopping) {
		eventfd_write(eventfds[next(&seed) % VECTORS], 1);
		done[0]++;
		if (next(&seed) % 8 == 0)
			nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
	}
	return NULL;
}

static void *invalidate_some(void *unused)
{
	uint32_t seed = 2;

	(void)unused;
	while (!stopping) {
		uint32_t index = next(&seed) % VECTORS;

		write_entry(index, &seed);
		must(irqrouter_agent_invalidate(agent, index, index + next(&seed) % 8), "invalidate");
		done[1]++;
		nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
	}
	return NULL;
}

static void *invalidate_all(void *unused)
{
	uint32_t seed = 3;

	(void)unused;
	while (!stopping) {
		uint64_t ns, waited;

		must(irqrouter_agent_invalidate_timed(agent, 0, IRQROUTER_UNINDEXED, &ns, &waited), "invalidate all");
		done[2]++;
		if (next(&seed) % 16 == 0)
			must(irqrouter_agent_set_registers(agent, TABLE | 7, 1), "set_registers");
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	return NULL;
}

static void *change(void *unused)
{
	uint32_t seed = 4;

	(void)unused;
	while (!stopping) {
		uint32_t index = 1 + next(&seed) % (VECTORS / 2); /* the others are removed by somebody else */

		must(irqrouter_agent_mask(agent, &vectors[index]), "mask");
		must(irqrouter_agent_program(agent, &vectors[index], 0xfee00010u | index << 5, 0, 0), "program");
		must(irqrouter_agent_unmask(agent, &vectors[index]), "unmask");
		done[3]++;
		nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
	}
	return NULL;
}

static void *replace(void *unused)
{
	uint32_t seed = 5;

	(void)unused;
	while (!stopping) {
		uint32_t index = VECTORS / 2 + 1 + next(&seed) % (VECTORS / 2 - 1);
		struct irqrouter_source source = source_of(index);
		struct irqrouter_vector old = vectors[index];

		must(irqrouter_agent_remove(agent, &old, 1), "remove");
		if (irqrouter_agent_mask(agent, &old) != -ENOENT)
			exit(1);
		must(irqrouter_agent_add(agent, &source, 1, &vectors[index]), "add");
		done[4]++;
		nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
	}
	return NULL;
}

static void *look(void *unused)
{
	(void)unused;
	while (!stopping) {
		struct irqrouter_route routes[2] = {{.gsi = 1, .address = 0xfee00000, .data = 0x40 + done[5] % 8},
						    {.gsi = 2, .address = 0xfee00000, .data = 0x41}};
		struct irqrouter_vector found[VECTORS];
		struct irqrouter_stats stats;
		struct irqrouter_status status;
		int i, count = irqrouter_agent_vectors(agent, found, VECTORS);

		for (i = 0; i < count && i < VECTORS; i++)
			irqrouter_agent_status(agent, &found[i], &status);
		irqrouter_agent_stats(agent, &stats, sizeof(stats));
		irqrouter_agent_eoi(agent, 0x30);
		must(irqrouter_agent_set_foreign_routes(agent, routes, done[5] % 3), "set_foreign_routes");
		done[5]++;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	return NULL;
}

static int make_vm(int *ram_fd)
{
	struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
	struct kvm_enable_cap x2apic = {.cap = KVM_CAP_X2APIC_API, .args = {1}};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, tries = 10;
	void *ram;

	must(kvm, "/dev/kvm");
	do
		vm = ioctl(kvm, KVM_CREATE_VM, 0);
	while (vm < 0 && errno == EINTR && --tries);
	must(vm, "KVM_CREATE_VM");
	must(ioctl(vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
	must(ioctl(vm, KVM_ENABLE_CAP, &x2apic), "KVM_CAP_X2APIC_API");
	must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	must(ioctl(vm, KVM_CREATE_VCPU, 1), "KVM_CREATE_VCPU");
	*ram_fd = memfd_create("ram", MFD_CLOEXEC);
	must(ftruncate(*ram_fd, RAM_SIZE), "ftruncate");
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, *ram_fd, 0);
	must(ram == MAP_FAILED ? -1 : 0, "mmap");
	entries = (uint64_t *)((char *)ram + TABLE);
	return vm;
}

static void begin(const char *socket_path)
{
	struct irqrouter_region region = {.size = RAM_SIZE};
	struct irqrouter_options options = {
		.size = sizeof(options),
		.socket_path = socket_path,
		.name = "hammer",
		.vm_fd = make_vm(&region.fd),
		.pins = 24,
		.remapper = IRQROUTER_REMAPPER_VTD,
		.host_address_width = 39,
		.on_fault = record,
	};
	struct irqrouter_source sources[VECTORS];
	uint32_t seed = 9, i;

	must(irqrouter_agent_create(&options, &agent), "create");
	must(irqrouter_agent_set_memory(agent, &region, 1), "set_memory");
	must(irqrouter_agent_set_registers(agent, TABLE | 7, 1), "set_registers");
	must(irqrouter_agent_wait_connected(agent, 20000), "wait_connected");
	for (i = 0; i < VECTORS; i++) {
		write_entry(i, &seed);
		eventfds[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		sources[i] = source_of(i);
	}
	must(irqrouter_agent_add(agent, sources, VECTORS, vectors), "add");
}

/* What is pending now was fired last: it must go, one way or the other. */
static bool drained(void)
{
	uint32_t seed = 10, i, tries;
	uint64_t count;

	for (i = 0; i < VECTORS; i++)
		write_entry(i, &seed);
	must(irqrouter_agent_invalidate(agent, 0, IRQROUTER_UNINDEXED), "invalidate all");
	for (tries = 0; tries < 2000; tries++) {
		bool pending = false;
		char path[64], info[512];

		for (i = 0; i < VECTORS; i++) {
			int fd;
			ssize_t length;

			snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", eventfds[i]);
			fd = open(path, O_RDONLY | O_CLOEXEC);
			length = read(fd, info, sizeof(info) - 1);
			close(fd);
			info[length > 0 ? length : 0] = 0;
			count = strtoull(strstr(info, "eventfd-count:") + strlen("eventfd-count:"), NULL, 16);
			pending |= count != 0;
		}
		if (!pending)
			return true;
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	}
	return false;
}

int main(int argc, char **argv)
{
	void *(*const roles[])(void *) = {fire, invalidate_some, invalidate_all, change, replace, look};
	pthread_t threads[6];
	unsigned int i;
	bool empty;

	if (argc != 3)
		return 2;
	begin(argv[1]);
	for (i = 0; i < 6; i++)
		pthread_create(&threads[i], NULL, roles[i], NULL);
	nanosleep(&(struct timespec){.tv_sec = atoi(argv[2])}, NULL);
	stopping = true;
	for (i = 0; i < 6; i++)
		pthread_join(threads[i], NULL);
	must(irqrouter_agent_wait_connected(agent, 20000), "wait_connected");
	empty = drained();
	irqrouter_agent_destroy(agent);
	printf("fired %u, invalidated %u and %u, changed %u, replaced %u, looked %u; %u faults\n", done[0], done[1],
	       done[2], done[3], done[4], done[5], faults);
	if (!empty)
		fprintf(stderr, "an event was left behind\n");
	return !empty;
}
