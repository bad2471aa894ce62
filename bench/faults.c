/* Fail, or end the process, at the n-th file operation below a folder.

   cc -shared -fPIC -O2 -o faults.so bench/faults.c -ldl; LD_PRELOAD=./faults.so python ...

   bench/victims.py calls arm(). Operations count that could change what is on disk: open for
   writing, write, fsync, rename, link, unlink, mkdir, rmdir, truncate, chmod, and their variants. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, TERM, NO_SPACE, IO_ERROR, FULL };
enum { SHORT = -1 };

struct record {
    long count;      /* operations so far, of this process and its children */
    long is_full;    /* the disk is full from now on */
    char kinds[1 << 16];
};

static struct record *record;
static char folder[PATH_MAX];
static long target;
static int fault;

void arm(const char *path, long n, int kind, struct record *shared)
{
    strncpy(folder, path, sizeof folder - 1);
    target = n, fault = kind, record = shared;
}

static int is_below(const char *path)
{
    size_t n = strlen(folder);
    return !strncmp(path, folder, n) && (path[n] == '/' || !path[n]);
}

/* whether a path counts; with path NULL, whether the file of a descriptor does */
static int counts(int fd, const char *path)
{
    char link[64], base[PATH_MAX], whole[2 * PATH_MAX];
    if (!record)
        return 0;
    if (path && path[0] == '/')
        return is_below(path);
    if (path && fd == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0)
        return 0;
    base[n] = 0;
    snprintf(whole, sizeof whole, path ? "%s/%s" : "%s", base, path);
    return is_below(whole);
}

/* Count an operation; -> 0: do it, an errno: fail, SHORT: write a part */
static int strike(char kind)
{
    long n = __atomic_add_fetch(&record->count, 1, __ATOMIC_SEQ_CST);
    int takes_room = strchr("owml", kind) != NULL;
    if (n < (long)sizeof record->kinds)
        record->kinds[n] = kind;
    if (record->is_full && takes_room)
        return ENOSPC;
    if (n != target)
        return 0;
    switch (fault) {
    case KILL:
        kill(getpid(), SIGKILL);
        pause();
    case TERM:
        kill(getpid(), SIGTERM);
        return 0;
    case NO_SPACE:
        return ENOSPC;
    case IO_ERROR:
        return EIO;
    case FULL:
        record->is_full = 1;
        return kind == 'w' ? SHORT : takes_room ? ENOSPC : 0;
    }
    return 0;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPERATION(name, kind, fd, path, parameters, arguments) \
    int name parameters \
    { \
        REAL(name); \
        int wrong = counts(fd, path) ? strike(kind) : 0; \
        return wrong > 0 ? (errno = wrong, -1) : real arguments; \
    }

OPERATION(fsync, 's', fd, NULL, (int fd), (fd))
OPERATION(fdatasync, 's', fd, NULL, (int fd), (fd))
OPERATION(ftruncate, 't', fd, NULL, (int fd, off_t size), (fd, size))
OPERATION(ftruncate64, 't', fd, NULL, (int fd, off64_t size), (fd, size))
OPERATION(fchmod, 'c', fd, NULL, (int fd, mode_t mode), (fd, mode))
OPERATION(truncate, 't', AT_FDCWD, path, (const char *path, off_t size), (path, size))
OPERATION(truncate64, 't', AT_FDCWD, path, (const char *path, off64_t size), (path, size))
OPERATION(chmod, 'c', AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
OPERATION(fchmodat, 'c', at, path, (int at, const char *path, mode_t mode, int flags),
          (at, path, mode, flags))
OPERATION(mkdir, 'm', AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
OPERATION(mkdirat, 'm', at, path, (int at, const char *path, mode_t mode), (at, path, mode))
OPERATION(rmdir, 'd', AT_FDCWD, path, (const char *path), (path))
OPERATION(unlink, 'u', AT_FDCWD, path, (const char *path), (path))
OPERATION(unlinkat, 'u', at, path, (int at, const char *path, int flags), (at, path, flags))
OPERATION(rename, 'r', AT_FDCWD, to, (const char *from, const char *to), (from, to))
OPERATION(renameat, 'r', at, to, (int of, const char *from, int at, const char *to),
          (of, from, at, to))
OPERATION(link, 'l', AT_FDCWD, to, (const char *from, const char *to), (from, to))
OPERATION(linkat, 'l', at, to, (int of, const char *from, int at, const char *to, int flags),
          (of, from, at, to, flags))
OPERATION(symlink, 'l', AT_FDCWD, path, (const char *to, const char *path), (to, path))

#define OPEN(name, at, parameters, ...) \
    int name parameters \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int writes = flags & O_CREAT || (flags & O_ACCMODE) != O_RDONLY; \
        int wrong = writes && counts(at, path) ? strike('o') : 0; \
        return wrong > 0 ? (errno = wrong, -1) : real(__VA_ARGS__, flags, mode); \
    }

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path)
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path)
OPEN(openat, at, (int at, const char *path, int flags, ...), at, path)
OPEN(openat64, at, (int at, const char *path, int flags, ...), at, path)

#define WRITE(name, type, data, size, part, parameters, ...) \
    ssize_t name(int fd, type data, size parameters) \
    { \
        REAL(name); \
        int wrong = counts(fd, NULL) ? strike('w') : 0; \
        if (wrong == SHORT && part(n) == 0) \
            wrong = ENOSPC; \
        return wrong > 0 ? (errno = wrong, -1) \
                         : real(fd, data, wrong == SHORT ? part(n) : n __VA_ARGS__); \
    }
#define HALF(n) ((n) / 2)
#define AND ,

WRITE(write, const void *, data, size_t, HALF, n)
WRITE(pwrite, const void *, data, size_t, HALF, n AND off_t at, AND at)
WRITE(pwrite64, const void *, data, size_t, HALF, n AND off64_t at, AND at)
WRITE(writev, const struct iovec *, data, int, HALF, n)
WRITE(pwritev, const struct iovec *, data, int, HALF, n AND off_t at, AND at)
