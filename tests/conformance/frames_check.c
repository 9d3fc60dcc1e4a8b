/*
 * The golden frames of tests/service/frames.txt against what agent/irqrouter_agent.c makes and understands: its structs
 * and constants, which are its own. Prints what is wrong; exits with 0 if nothing is.
 *
 *   cc -std=gnu11 -Wall -Wextra -Werror -pthread frames_check.c && ./a.out frames.txt
 */
#include "../../agent/irqrouter_agent.c"

#include <ctype.h>

#define FRAMES_MAX 128

struct frame {
	char name[64];
	uint8_t bytes[FRAME_MAX];
	size_t size;
};

static struct frame frames[FRAMES_MAX];
static size_t frames_count;
static int wrong;

static void complain(const char *name, const char *what)
{
	printf("%s: %s\n", name, what);
	wrong = 1;
}

static void put(struct frame *frame, uint8_t byte)
{
	if (frame->size < sizeof(frame->bytes))
		frame->bytes[frame->size++] = byte;
	else
		complain(frame->name, "too long");
}

static int digit(int c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* One token that is hex: bytes, or one byte and how often. */
static void parse_hex(struct frame *frame, const char *token)
{
	unsigned long times = 1;
	size_t length = strcspn(token, "*");

	if (token[length] == '*') {
		times = strtoul(token + length + 1, NULL, 10);
		if (length != 2)
			complain(token, "only one byte may be repeated");
	}
	for (size_t i = 0; i + 1 < length; i += 2) {
		if (digit(token[i]) < 0 || digit(token[i + 1]) < 0)
			complain(token, "is not hex");
		for (unsigned long n = 0; n < times; n++)
			put(frame, (uint8_t)(digit(token[i]) << 4 | digit(token[i + 1])));
	}
	if (length % 2)
		complain(token, "has half a byte");
}

static void parse_line(char *at)
{
	struct frame *frame = frames_count ? &frames[frames_count - 1] : NULL;

	while (*at && *at != '#') {
		size_t length = strcspn(at, " \t\n");

		if (isspace((unsigned char)*at)) {
			at++;
		} else if (*at == '"') {
			for (at++; *at && *at != '"'; at++)
				put(frame, (uint8_t)*at);
			at += *at == '"';
		} else {
			char after = at[length];

			at[length] = 0;
			if (at[length - 1] == ':') {
				at[length - 1] = 0;
				if (frames_count == FRAMES_MAX || length > sizeof(frame->name)) {
					complain(at, "no room for it");
					exit(1);
				}
				frame = &frames[frames_count++];
				memcpy(frame->name, at, length);
			} else {
				parse_hex(frame, at);
			}
			at[length] = after;
			at += length;
		}
	}
}

static const struct frame *named(const char *name)
{
	static const struct frame none;

	for (size_t i = 0; i < frames_count; i++)
		if (!strcmp(frames[i].name, name))
			return &frames[i];
	complain(name, "is missing");
	return &none;
}

/* The frame called `name` is `header`, then `size` bytes at `payload`. */
static void is(const char *name, struct header header, const void *payload, size_t size)
{
	const struct frame *frame = named(name);

	header.size = (uint32_t)(sizeof(header) + size);
	if (frame->size != header.size)
		complain(name, "has another size");
	else if (memcmp(frame->bytes, &header, sizeof(header)))
		complain(name, "has another header");
	else if (size && memcmp(frame->bytes + sizeof(header), payload, size))
		complain(name, "has another payload");
}

#define MESSAGE_OPERATION(k, v, g, a, d) \
	{.kind = (k), .vector = (v), .generation = (g), .address = (a), .data = (d)}
#define RECORD_OPERATION(k, f, v, g, low, high) \
	{.kind = (k), .flags = (f), .vector = (v), .generation = (g), .address = (low), \
	 .data = (uint32_t)(high), .tail = (uint32_t)((high) >> 32)}

static void check(void)
{
	struct hello hello = {
		.magic = MAGIC, .version_low = VERSION, .version_high = VERSION,
		.features = FEATURE_PREPARE | FEATURE_WIDE, .remapper = IRQROUTER_REMAPPER_VTD,
		.host_address_width = 52, .slots = 256, .name = "vm-1",
	};
	struct welcome welcome = {
		.version = VERSION, .vectors_max = 256, .features = FEATURE_PREPARE | FEATURE_WIDE, .regions_max = 64,
		.frames_per_second = 5000,
	};
	struct {
		struct counted counted;
		struct wire_region regions[2];
	} memory = {{2, 0}, {{.size = 0xa0000}, {1ull << 32, 2ull << 30, 1 << 20, 1, 0}}};
	struct {
		struct counted counted;
		struct added added[2];
	} add = {{2, 0}, {{0, FLAG_NEW, 1}, {7, 0, 0x0102030405060708}}};
	struct {
		struct counted counted;
		struct operation ops[2];
	} add_reply = {{2, 0}, {MESSAGE_OPERATION(SET_ROUTE, 0, 1, 0xfee01000, 0x4041),
				MESSAGE_OPERATION(ASSIGN, 0, 1, 0, 0)}};
	struct {
		struct counted counted;
		struct operation op;
	} invalidate_reply = {{1, 0}, MESSAGE_OPERATION(SET_ROUTE, 7, 256, 0x100fee2c000, 0x4050)};
	struct scope one = {5, 5}, all = {0, IRQROUTER_UNINDEXED};
	struct {
		struct counted counted;
		struct operation ops[7];
	} batch = {{7, 0}, {
		MESSAGE_OPERATION(SET_ROUTE, 1, 10, 0xfee01000, 0x4041),
		MESSAGE_OPERATION(CATCH, 2, 11, 0xfee00000, 0x4042),
		RECORD_OPERATION(CATCH_FAULT, 0, 3, 12, 0x0005000000000000ull, 0x8000002200000018ull),
		RECORD_OPERATION(CATCH_FAULT, FLAG_RECORD, 4, 13, 0x0006000000000000ull, 0x8000002300000019ull),
		MESSAGE_OPERATION(ASSIGN, 5, 14, 0, 0),
		RECORD_OPERATION(ASSIGN, FLAG_DELIVERING, 6, 15, 0, 0ull),
		MESSAGE_OPERATION(PREPARE, 7, UINT64_MAX, 0xfee02000, 0x4043),
	}};
	struct {
		struct counted counted;
		uint32_t errnos[7];
	} batch_reply = {{7, 0}, {0, EAGAIN, ESTALE, EALREADY, EINPROGRESS, ENXIO, ECANCELED}};
	struct {
		struct counted counted;
		struct operation ops[3];
	} translate = {{3, 0}, {MESSAGE_OPERATION(MISS, 1, 10, 0, 0), MESSAGE_OPERATION(MISS, 2, 11, 0, 0),
				MESSAGE_OPERATION(MISS, 3, 12, 0, 0)}};
	struct {
		struct counted counted;
		struct operation ops[3];
	} translated = {{3, 0}, {MESSAGE_OPERATION(UPDATE, 1, 10, 0xfee01000, 0x4041),
				 RECORD_OPERATION(FAULT, 0, 2, 11, 0x1122334455667788ull, 0x99aabbccddeeff00ull),
				 MESSAGE_OPERATION(MISS, 3, 12, 0, 0)}};
	struct page_header page_header = {PAGE_MAGIC, 2, 0x1008, 3};
	struct page_slot slot = {
		.generation = 0x0102030405060708, .born = 1, .address = 0xfee000d0, .data = 2, .requester = 0x18,
		.state = DEASSIGNED | PAGE_PREPARED | PAGE_ROUTED, .refused = EINVAL, .cookie = 6, .gsi = 24,
		.invalidations = 3, .caught = 4, .faults = 5, .stale = 6, .discarded = 7, .last_catch_ns = 8,
	};

	is("hello", (struct header){.id = 1, .command = HELLO}, &hello, sizeof(hello));
	is("hello-reply", (struct header){.id = 1, .command = HELLO, .flags = FLAG_REPLY}, &welcome, sizeof(welcome));
	is("memory", (struct header){.id = 2, .command = MEMORY}, &memory, sizeof(memory));
	is("memory-reply", (struct header){.id = 2, .command = MEMORY, .flags = FLAG_REPLY}, NULL, 0);
	is("add", (struct header){.id = 3, .command = ADD}, &add, sizeof(add));
	is("add-reply", (struct header){.id = 3, .command = ADD, .flags = FLAG_REPLY}, &add_reply, sizeof(add_reply));
	is("invalidate-one", (struct header){.id = 4, .command = INVALIDATE}, &one, sizeof(one));
	is("invalidate-all", (struct header){.id = 5, .command = INVALIDATE}, &all, sizeof(all));
	is("invalidate-reply", (struct header){.id = 4, .command = INVALIDATE, .flags = FLAG_REPLY}, &invalidate_reply,
	   sizeof(invalidate_reply));
	is("ping", (struct header){.id = 0xffff, .command = PING}, NULL, 0);
	is("ping-reply", (struct header){.id = 0xffff, .command = PING, .flags = FLAG_REPLY}, NULL, 0);
	is("batch", (struct header){.id = 0x8000, .command = BATCH}, &batch, sizeof(batch));
	is("batch-reply", (struct header){.id = 0x8000, .command = BATCH, .flags = FLAG_REPLY}, &batch_reply,
	   sizeof(batch_reply));
	is("translate", (struct header){.id = 0x8001, .command = TRANSLATE}, &translate, sizeof(translate));
	is("translate-reply", (struct header){.id = 0x8001, .command = TRANSLATE, .flags = FLAG_REPLY}, &translated,
	   sizeof(translated));
	if (named("page-header")->size != sizeof(page_header) ||
	    memcmp(named("page-header")->bytes, &page_header, sizeof(page_header)))
		complain("page-header", "is another");
	if (named("page-slot")->size != sizeof(slot) || memcmp(named("page-slot")->bytes, &slot, sizeof(slot)))
		complain("page-slot", "is another");
	if (memcmp(named("add-reply-first")->bytes + 8, &(uint32_t){FLAG_REPLY | FLAG_MORE}, 4) ||
	    memcmp(named("add-reply-error")->bytes + 8, &(uint32_t){FLAG_REPLY | FLAG_ERROR}, 4))
		complain("add-reply-first, add-reply-error", "have other flags");
}

int main(int argc, char **argv)
{
	char line[4096];
	FILE *file = argc == 2 ? fopen(argv[1], "r") : NULL;

	if (!file) {
		fprintf(stderr, "usage: %s frames.txt\n", argv[0]);
		return 2;
	}
	while (fgets(line, sizeof(line), file))
		parse_line(line);
	fclose(file);
	check();
	printf("%zu frames\n", frames_count);
	return wrong;
}
