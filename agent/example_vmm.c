// SPDX-License-Identifier: MIT
/*
 * A VMM as small as one can be that uses irqrouter: how to attach, and where the calls go.
 *
 * The guest is a program of real-mode handlers, one for each interrupt vector, that count in guest memory; two vCPUs
 * idle. "Devices" are eventfds. This file plays the guest's driver as well: it writes the interrupt remapping table in
 * guest memory as VT-d has it, and calls the agent where a VMM would have trapped the guest's register write:
 *
 *   the guest does                          the VMM calls
 *   sets up a device's MSI-X table entry    irqrouter_agent_add(), then irqrouter_agent_program()
 *   masks, unmasks an entry                 irqrouter_agent_mask(), irqrouter_agent_unmask()
 *   GCMD.SIRTP, GCMD.IRE                    irqrouter_agent_set_registers(), before GSTS shows it
 *   an iec_inv_dsc in the queue             irqrouter_agent_invalidate(), before the wait descriptor's status is set
 *   its I/OAPIC pins                        irqrouter_agent_set_foreign_routes()
 *
 *   irqrouter serve --socket /tmp/agent.socket --admin-socket /tmp/admin.socket &
 *   example_vmm --socket /tmp/agent.socket
 */
#define _GNU_SOURCE
#include "irqrouter_agent.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PINS 24
#define VCPUS 2
#define DEVICES 6

/* Guest physical memory. */
#define RAM_SIZE 0x30000u
#define HANDLERS 0x1000u  /* 16 bytes each */
#define FINISH 0x2000u	  /* the end of every handler */
#define IDLE 0x2020u	  /* where a vCPU starts */
#define STACKS 0x3000u
#define TABLE 0x10000u	  /* the interrupt remapping table: 256 entries of 16 bytes */
#define TABLE_SIZE_CODE 7 /* IRTA.S: 2^(7+1) entries */
#define COUNTERS 0x20000u /* [guest vector][vCPU], 16 bytes apart, as that is what a segment can point to */

#define DEVICE_REQUESTER(n) ((uint32_t)(3 + (n)) << 3) /* 00:03.0, 00:04.0, ... */

struct vcpu {
	int fd;
	struct kvm_run *run;
	pthread_t thread;
};

struct vmm {
	int kvm, vm, ram_fd;
	unsigned char *ram;
	size_t run_size;
	struct vcpu vcpus[VCPUS];
	int devices[DEVICES]; /* their eventfds: VFIO's or vhost's, in a real VMM */
	struct irqrouter_agent *agent;
	struct irqrouter_vector vectors[DEVICES];
	_Atomic unsigned int faults;
	uint64_t fault_low, fault_high; /* the fault recording register */
	uint32_t expected[256][VCPUS];
	bool failed;
};

static _Atomic bool stopping;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int checked(int result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

static void must(int result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "%s: %s\n", what, strerror(-result));
		exit(1);
	}
}

/* ---- the guest -------------------------------------------------------------------------------------------------- */

static uint32_t counter_offset(unsigned int vector, unsigned int cpu)
{
	return 16 * (vector * VCPUS + cpu);
}

static uint32_t counted(const struct vmm *vmm, unsigned int vector, unsigned int cpu)
{
	return __atomic_load_n((uint32_t *)(vmm->ram + COUNTERS + counter_offset(vector, cpu)), __ATOMIC_ACQUIRE);
}

/* inc dword [counter]; jmp FINISH. DS begins at the vCPU's own first counter. */
static void write_handler(unsigned char *ram, unsigned int vector)
{
	uint16_t handler = (uint16_t)(HANDLERS + 16 * vector);
	uint16_t offset = (uint16_t)counter_offset(vector, 0);
	int16_t jump = (int16_t)(FINISH - (handler + 8));
	unsigned char code[8] = {0x66, 0xff, 0x06, 0, 0, 0xe9, 0, 0};

	memcpy(code + 3, &offset, 2);
	memcpy(code + 6, &jump, 2);
	memcpy(ram + handler, code, sizeof(code));
	memcpy(ram + 4 * vector, &handler, 2);
}

static void write_guest(unsigned char *ram)
{
	static const unsigned char finish[] = {
		0x66, 0xb9, 0x0b, 0x08, 0, 0, /* mov ecx, 80Bh: the x2APIC EOI register */
		0x66, 0x31, 0xc0,	      /* xor eax, eax */
		0x66, 0x31, 0xd2,	      /* xor edx, edx */
		0x0f, 0x30, 0xcf,	      /* wrmsr; iret */
	};
	static const unsigned char idle[] = {0xfb, 0xf4, 0xeb, 0xfc}; /* sti; hlt; jmp idle */
	unsigned int vector;

	for (vector = 0x20; vector < 0xff; vector++)
		write_handler(ram, vector);
	memcpy(ram + FINISH, finish, sizeof(finish));
	memcpy(ram + IDLE, idle, sizeof(idle));
}

/* The guest's driver writes an entry of the table: present, fixed, edge, physical destination. */
static void write_irte(struct vmm *vmm, unsigned int index, unsigned int vector, unsigned int cpu, bool present)
{
	uint64_t *entry = (uint64_t *)(vmm->ram + TABLE + 16 * index);

	__atomic_store_n(&entry[0], (uint64_t)cpu << 40 | vector << 16 | present, __ATOMIC_RELEASE);
}

/* ---- the VM ----------------------------------------------------------------------------------------------------- */

static void create_vm(struct vmm *vmm)
{
	struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {PINS}};
	struct kvm_enable_cap x2apic = {
		.cap = KVM_CAP_X2APIC_API,
		.args = {KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK},
	};
	int tries = 10;

	vmm->kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	do /* KVM gives up with EINTR at times, signal or not */
		vmm->vm = ioctl(vmm->kvm, KVM_CREATE_VM, 0);
	while (vmm->vm < 0 && errno == EINTR && --tries);
	checked(vmm->vm, "KVM_CREATE_VM");
	checked(ioctl(vmm->vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
	checked(ioctl(vmm->vm, KVM_ENABLE_CAP, &x2apic), "KVM_CAP_X2APIC_API");
}

/* The service reads the table from the file: so guest memory is a memfd, and mapped MAP_SHARED. */
static void create_memory(struct vmm *vmm)
{
	struct kvm_userspace_memory_region region = {.memory_size = RAM_SIZE};

	vmm->ram_fd = checked(memfd_create("guest-ram", MFD_CLOEXEC), "memfd_create");
	checked(ftruncate(vmm->ram_fd, RAM_SIZE), "ftruncate");
	vmm->ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vmm->ram_fd, 0);
	if (vmm->ram == MAP_FAILED)
		die("mmap");
	region.userspace_addr = (uintptr_t)vmm->ram;
	checked(ioctl(vmm->vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	write_guest(vmm->ram);
}

static void set_cpuid(struct vmm *vmm, int vcpu)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 256 * sizeof(cpuid->entries[0]));
	unsigned int i;

	if (!cpuid)
		die("calloc");
	cpuid->nent = 256;
	checked(ioctl(vmm->kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	for (i = 0; i < cpuid->nent; i++) {
		if (cpuid->entries[i].function == 1)
			cpuid->entries[i].ecx |= 1u << 21; /* x2APIC */
	}
	checked(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	free(cpuid);
}

/* Real mode, the local APIC in x2APIC mode and enabled. */
static void set_registers(int vcpu, unsigned int number)
{
	struct kvm_regs regs = {.rip = IDLE, .rsp = STACKS + 0x100 * (number + 1), .rflags = 2};
	struct kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE};
	const uint32_t enabled = 0x1ff;
	struct kvm_lapic_state lapic;
	struct kvm_sregs sregs;

	checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	sregs.ds.base = COUNTERS + counter_offset(0, number);
	sregs.ds.selector = (uint16_t)(sregs.ds.base >> 4);
	sregs.apic_base |= 0xc00;
	checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	checked(ioctl(vcpu, KVM_GET_LAPIC, &lapic), "KVM_GET_LAPIC");
	memcpy(lapic.regs + 0xf0, &enabled, sizeof(enabled)); /* the spurious vector register */
	checked(ioctl(vcpu, KVM_SET_LAPIC, &lapic), "KVM_SET_LAPIC");
	checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	checked(ioctl(vcpu, KVM_SET_MP_STATE, &runnable), "KVM_SET_MP_STATE");
}

static void create_vcpus(struct vmm *vmm)
{
	unsigned int i;

	vmm->run_size = (size_t)checked(ioctl(vmm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	for (i = 0; i < VCPUS; i++) {
		struct vcpu *vcpu = &vmm->vcpus[i];

		vcpu->fd = checked(ioctl(vmm->vm, KVM_CREATE_VCPU, i), "KVM_CREATE_VCPU");
		vcpu->run = mmap(NULL, vmm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
		if (vcpu->run == MAP_FAILED)
			die("mmap");
		set_cpuid(vmm, vcpu->fd);
		set_registers(vcpu->fd, i);
	}
}

/*
 * A real VMM's loop has more exits. For level lines it calls irqrouter_agent_eoi(agent, run->eoi.vector) on
 * KVM_EXIT_IOAPIC_EOI.
 */
static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = argument;

	while (!stopping) {
		if (ioctl(vcpu->fd, KVM_RUN, 0) == 0) {
			fprintf(stderr, "the guest left KVM_RUN: exit reason %u\n", vcpu->run->exit_reason);
			exit(1);
		}
		if (errno != EINTR && errno != EAGAIN)
			die("KVM_RUN");
	}
	return NULL;
}

static void ignore(int signal)
{
	(void)signal;
}

static void start_vcpus(struct vmm *vmm)
{
	struct sigaction action = {.sa_handler = ignore};
	unsigned int i;

	checked(sigaction(SIGUSR1, &action, NULL), "sigaction");
	for (i = 0; i < VCPUS; i++) {
		if (pthread_create(&vmm->vcpus[i].thread, NULL, run_vcpu, &vmm->vcpus[i]))
			die("pthread_create");
	}
}

static void stop_vcpus(struct vmm *vmm)
{
	unsigned int i;

	stopping = true;
	for (i = 0; i < VCPUS; i++) {
		__atomic_store_n(&vmm->vcpus[i].run->immediate_exit, 1, __ATOMIC_RELAXED);
		pthread_kill(vmm->vcpus[i].thread, SIGUSR1);
		pthread_join(vmm->vcpus[i].thread, NULL);
	}
}

/* ---- attaching irqrouter ---------------------------------------------------------------------------------------- */

/* The agent's lock is held: store, and nothing else. */
static void record_fault(void *opaque, const struct irqrouter_vector *vector, uint64_t low, uint64_t high)
{
	struct vmm *vmm = opaque;

	(void)vector;
	vmm->fault_low = low;
	vmm->fault_high = high;
	vmm->faults++; /* the fault event interrupt of a real VMM is raised by another thread that this one wakes */
}

static void say(void *opaque, const char *text)
{
	(void)opaque;
	fprintf(stderr, "irqrouter: %s\n", text);
}

static void attach(struct vmm *vmm, const char *socket_path, const char *name)
{
	struct irqrouter_options options = {
		.size = sizeof(options),
		.socket_path = socket_path,
		.name = name,
		.vm_fd = vmm->vm,
		.pins = PINS,
		.remapper = IRQROUTER_REMAPPER_VTD,
		.host_address_width = 39, /* as this VMM's DMAR table tells the guest */
		.opaque = vmm,
		.on_fault = record_fault,
		.log = say,
	};
	struct irqrouter_region region = {
		.size = RAM_SIZE,
		.host_address = vmm->ram, /* has the agent check that it is mapped MAP_SHARED */
		.fd = vmm->ram_fd,
	};

	must(irqrouter_agent_create(&options, &vmm->agent), "irqrouter_agent_create");
	must(irqrouter_agent_set_memory(vmm->agent, &region, 1), "irqrouter_agent_set_memory");
	/* GCMD.SIRTP with the table's address and size, then GCMD.IRE: remapping is on (GSTS.IRES). */
	must(irqrouter_agent_set_registers(vmm->agent, TABLE | TABLE_SIZE_CODE, 1), "irqrouter_agent_set_registers");
	/* A VMM need not wait: until the service is there, events wait in their eventfds. */
	must(irqrouter_agent_wait_connected(vmm->agent, 5000), socket_path);
}

/* The message that the guest's driver gives a device: "use entry `index` of the table" (remappable format). */
static struct irqrouter_source source_of(int eventfd, unsigned int index)
{
	return (struct irqrouter_source){
		.eventfd = eventfd,
		.resample = -1,
		.address = 0xfee00010u | index << 5,
		.requester = DEVICE_REQUESTER(index),
	};
}

static void add_devices(struct vmm *vmm)
{
	struct irqrouter_source sources[DEVICES];
	unsigned int i;

	for (i = 0; i < DEVICES; i++) {
		vmm->devices[i] = checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd");
		sources[i] = source_of(vmm->devices[i], i);
	}
	must(irqrouter_agent_add(vmm->agent, sources, DEVICES, vmm->vectors), "irqrouter_agent_add");
}

/* ---- what happens, and whether it was right --------------------------------------------------------------------- */

static bool all_arrived(const struct vmm *vmm)
{
	unsigned int vector, cpu;

	for (vector = 0; vector < 256; vector++) {
		for (cpu = 0; cpu < VCPUS; cpu++) {
			if (counted(vmm, vector, cpu) != vmm->expected[vector][cpu])
				return false;
		}
	}
	return true;
}

static void pause_briefly(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

static void report(struct vmm *vmm, const char *title)
{
	unsigned int vector, cpu;
	int tries;

	for (tries = 0; tries < 25000 && !all_arrived(vmm); tries++)
		pause_briefly();
	printf("%s\n", title);
	for (vector = 0; vector < 256; vector++) {
		for (cpu = 0; cpu < VCPUS; cpu++) {
			uint32_t found = counted(vmm, vector, cpu), expected = vmm->expected[vector][cpu];

			if (found || expected)
				printf("  vCPU %u, vector %02xh: %u%s\n", cpu, vector, found,
				       found == expected ? "" : "   WRONG");
			vmm->failed |= found != expected;
		}
	}
	memset(vmm->expected, 0, sizeof(vmm->expected));
	memset(vmm->ram + COUNTERS, 0, RAM_SIZE - COUNTERS);
}

static void fire(struct vmm *vmm, unsigned int device, unsigned int vector, unsigned int cpu)
{
	checked(eventfd_write(vmm->devices[device], 1), "eventfd_write");
	vmm->expected[vector][cpu]++;
}

static bool is_assigned(struct vmm *vmm, unsigned int device)
{
	struct irqrouter_status status;

	must(irqrouter_agent_status(vmm->agent, &vmm->vectors[device], &status), "irqrouter_agent_status");
	return status.state == IRQROUTER_ASSIGNED;
}

static void begin(struct vmm *vmm)
{
	unsigned int i;

	for (i = 0; i < DEVICES; i++)
		write_irte(vmm, i, 0x30 + i, i % VCPUS, true);
	add_devices(vmm);
	for (i = 0; i < DEVICES; i++)
		fire(vmm, i, 0x30 + i, i % VCPUS);
	report(vmm, "every device fires: KVM delivers");
}

/* The first event is caught by the agent, and the next has KVM deliver again. */
static void retarget_one(struct vmm *vmm)
{
	int count;

	write_irte(vmm, 0, 0x50, 1, true);
	count = irqrouter_agent_invalidate(vmm->agent, 0, 0);
	must(count, "irqrouter_agent_invalidate");
	printf("device 0 goes to vCPU 1, vector 50h; the invalidation touched %d vector\n", count);
	fire(vmm, 0, 0x50, 1);
	report(vmm, "device 0 fires: caught and delivered by its new entry");
	fire(vmm, 0, 0x50, 1);
	report(vmm, "device 0 fires again");
	printf("device 0 is %s\n", is_assigned(vmm, 0) ? "assigned: KVM delivers again" : "not assigned yet");
}

static void retarget_all(struct vmm *vmm)
{
	unsigned int i;
	int count;

	for (i = 0; i < DEVICES; i++)
		write_irte(vmm, i, 0x60 + i, (i + 1) % VCPUS, true);
	count = irqrouter_agent_invalidate(vmm->agent, 0, IRQROUTER_UNINDEXED);
	must(count, "irqrouter_agent_invalidate");
	printf("every device is moved; the global invalidation touched %d vectors\n", count);
	for (i = 0; i < DEVICES; i++)
		fire(vmm, i, 0x60 + i, (i + 1) % VCPUS);
	report(vmm, "every device fires");
}

static void break_one(struct vmm *vmm)
{
	int tries;

	write_irte(vmm, 5, 0, 0, false);
	must(irqrouter_agent_invalidate(vmm->agent, 5, 5), "irqrouter_agent_invalidate");
	checked(eventfd_write(vmm->devices[5], 1), "eventfd_write");
	for (tries = 0; tries < 25000 && !vmm->faults; tries++)
		pause_briefly();
	report(vmm, "device 5's entry is not present any more; it fires");
	vmm->failed |= vmm->faults != 1;
	if (vmm->faults)
		printf("  a fault is recorded: reason %02xh, index %u, requester %02x:%02x.%x\n",
		       (unsigned int)(vmm->fault_high >> 32 & 0xff), (unsigned int)(vmm->fault_low >> 48),
		       (unsigned int)(vmm->fault_high >> 8 & 0xff), (unsigned int)(vmm->fault_high >> 3 & 0x1f),
		       (unsigned int)(vmm->fault_high & 7));
}

/* For those who want to look: irqrouter status, top, trace. Devices 0 to 4 go on firing, device 0 moves each second. */
static void stay(struct vmm *vmm)
{
	struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
	unsigned int i, tenths = 0;

	puts("staying until there is a line, or the end, on standard input");
	fflush(stdout);
	while (poll(&input, 1, 100) == 0) {
		if (tenths++ % 10 == 0) {
			write_irte(vmm, 0, 0x50, tenths / 10 % VCPUS, true);
			must(irqrouter_agent_invalidate(vmm->agent, 0, 0), "irqrouter_agent_invalidate");
		}
		for (i = 0; i < DEVICES - 1; i++)
			checked(eventfd_write(vmm->devices[i], 1), "eventfd_write");
	}
}

static void end(struct vmm *vmm)
{
	unsigned int i;

	must(irqrouter_agent_remove(vmm->agent, vmm->vectors, DEVICES), "irqrouter_agent_remove");
	irqrouter_agent_destroy(vmm->agent);
	stop_vcpus(vmm);
	for (i = 0; i < DEVICES; i++)
		close(vmm->devices[i]);
	for (i = 0; i < VCPUS; i++) {
		munmap(vmm->vcpus[i].run, vmm->run_size);
		close(vmm->vcpus[i].fd);
	}
	close(vmm->vm);
	close(vmm->kvm);
	munmap(vmm->ram, RAM_SIZE);
	close(vmm->ram_fd);
}

static const char usage[] =
	"usage: example_vmm [--socket PATH] [--name NAME] [--stay]\n"
	"\n"
	"Makes a VM, attaches it to the service, moves interrupts about, and prints what arrived where.\n"
	"\n"
	"  --socket PATH  the service's socket (default: /run/irqrouter/agent.socket)\n"
	"  --name NAME    what the service calls the VM (default: example)\n"
	"  --stay         then stay attached, devices firing, until there is a line on standard input\n"
	"\n"
	"exit status: 0 all arrived where it should, 1 it did not or something failed\n";

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"socket", required_argument, NULL, 's'},
		{"name", required_argument, NULL, 'n'},
		{"stay", no_argument, NULL, 'y'},
		{"help", no_argument, NULL, 'h'},
		{0},
	};
	const char *socket_path = "/run/irqrouter/agent.socket", *name = "example";
	struct vmm vmm = {0};
	bool stays = false;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 's')
			socket_path = optarg;
		else if (option == 'n')
			name = optarg;
		else if (option == 'y')
			stays = true;
		else {
			fputs(usage, option == 'h' ? stdout : stderr);
			return option == 'h' ? 0 : 1;
		}
	}
	create_vm(&vmm);
	create_memory(&vmm);
	create_vcpus(&vmm);
	start_vcpus(&vmm);
	attach(&vmm, socket_path, name);
	begin(&vmm);
	retarget_one(&vmm);
	retarget_all(&vmm);
	break_one(&vmm);
	if (stays)
		stay(&vmm);
	end(&vmm);
	puts(vmm.failed ? "NOT everything arrived where it should" : "everything arrived where it should");
	return vmm.failed;
}
