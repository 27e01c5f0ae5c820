/* A disk that fills up: after `torture_full(n)` no more than n bytes are written to files, and then ENOSPC.
 *
 * cc -shared -fPIC -o full.so full.c -ldl;  LD_PRELOAD=./full.so python tests/torture/processes.py
 * Pipes, sockets, terminals and the standard streams are left alone. What is written through mmap is not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1; /* bytes; -1: the disk is large */

void torture_full(long bytes) { left = bytes; }

static int is_file(int fd) {
  struct stat status;
  return left >= 0 && fd > 2 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
}

/* How many of `count` bytes fit; -1 and ENOSPC where none does. */
static ssize_t room(int fd, size_t count) {
  if (!is_file(fd) || count == 0) return (ssize_t)count;
  if (left == 0) {
    errno = ENOSPC;
    return -1;
  }
  return (ssize_t)count < left ? (ssize_t)count : left;
}

static ssize_t spent(int fd, ssize_t done) {
  if (done > 0 && is_file(fd)) left -= done < left ? done : left;
  return done;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

ssize_t write(int fd, const void *data, size_t count) {
  ssize_t fits = room(fd, count);
  return fits < 0 ? -1 : spent(fd, REAL("write", ssize_t(*)(int, const void *, size_t))(fd, data, (size_t)fits));
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
  ssize_t fits = room(fd, count);
  if (fits < 0) return -1;
  return spent(fd, REAL("pwrite64", ssize_t(*)(int, const void *, size_t, off64_t))(fd, data, (size_t)fits, at));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  size_t whole = 0;
  for (int i = 0; i < count; i++) whole += parts[i].iov_len;
  ssize_t fits = room(fd, whole);
  if (fits < 0) return -1;
  if ((size_t)fits < whole) return write(fd, parts[0].iov_base, parts[0].iov_len);
  return spent(fd, REAL("writev", ssize_t(*)(int, const struct iovec *, int))(fd, parts, count));
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t count) {
  ssize_t fits = room(out, count);
  if (fits < 0) return -1;
  return spent(out, REAL("sendfile64", ssize_t(*)(int, int, off64_t *, size_t))(out, in, at, (size_t)fits));
}

ssize_t sendfile(int out, int in, off_t *at, size_t count) { return sendfile64(out, in, (off64_t *)at, count); }
