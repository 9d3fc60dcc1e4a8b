/* Looks at the agent's system calls: linked into it with --wrap=ioctl. See Hooks in target.py. */
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>

/* Told of each call before it is made; returns the errno that it must fail with, or 0. */
static int (*_Atomic entered)(int call);

__attribute__((visibility("default"))) void hook(int (*function)(int call))
{
	atomic_store(&entered, function);
}

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	int (*function)(int call) = atomic_load(&entered);
	int call = -1, code = 0;
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	switch (request) {
	case KVM_IRQFD:
		call = ((struct kvm_irqfd *)argument)->flags & KVM_IRQFD_FLAG_DEASSIGN ? 1 : 0;
		break;
	case KVM_SET_GSI_ROUTING:
		call = 2;
		break;
	case KVM_SIGNAL_MSI:
		call = 3;
		break;
	}
	if (call >= 0 && function)
		code = function(call);
	if (code) {
		errno = code;
		return -1;
	}
	return __real_ioctl(fd, request, argument);
}
