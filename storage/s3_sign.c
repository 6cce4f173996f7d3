/* s3_sign: read s3_sign: canonical request, text to sign, key, signature. */
#include "storage/s3_sign.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { HASH_BYTES = 32, SCOPE_BYTES = 128 };

static void hex(const unsigned char *b, size_t n, char *out)
{
    static const char digit[] = "0123456789abcdef";
    for (size_t i = 0; i < n; i++) {
        out[2 * i] = digit[b[i] >> 4];
        out[2 * i + 1] = digit[b[i] & 15];
    }
    out[2 * n] = 0;
}

status *s3_sha256(const struct http_piece *piece, size_t count, char out[S3_SHA256_HEX_BYTES])
{
    unsigned char hash[HASH_BYTES];
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    bool ok = c && EVP_DigestInit_ex(c, EVP_sha256(), NULL);
    for (size_t i = 0; ok && i < count; i++)
        ok = EVP_DigestUpdate(c, piece[i].data, piece[i].bytes);
    ok = ok && EVP_DigestFinal_ex(c, hash, NULL);
    EVP_MD_CTX_free(c);
    if (!ok)
        return ERR(INTERNAL, "libcrypto: SHA-256 failed");
    hex(hash, sizeof hash, out);
    return NULL;
}

status *s3_md5(const void *data, size_t n, char out[S3_MD5_TEXT_BYTES])
{
    unsigned char hash[16];
    if (!EVP_Digest(data, n, hash, NULL, EVP_md5(), NULL))
        return ERR(UNSUPPORTED, "libcrypto: there is no MD5 in this system's configuration (FIPS?)");
    EVP_EncodeBlock((unsigned char *)out, hash, sizeof hash);
    return NULL;
}

void s3_crc32c_text(uint32_t crc, char out[S3_CRC32C_TEXT_BYTES])
{
    const unsigned char b[4] = { (unsigned char)(crc >> 24), (unsigned char)(crc >> 16), (unsigned char)(crc >> 8),
                                 (unsigned char)crc };
    EVP_EncodeBlock((unsigned char *)out, b, sizeof b);
}

void s3_time_text(uint64_t seconds, char out[S3_TIME_BYTES])
{
    time_t t = (time_t)seconds;
    struct tm tm;
    if (!gmtime_r(&t, &tm) || strftime(out, S3_TIME_BYTES, "%Y%m%dT%H%M%SZ", &tm) == 0)
        out[0] = 0;
}

static bool hmac(const void *key, size_t key_bytes, const char *text, unsigned char out[HASH_BYTES])
{
    unsigned n = 0;
    return HMAC(EVP_sha256(), key, (int)key_bytes, (const unsigned char *)text, strlen(text), out, &n) &&
           n == HASH_BYTES;
}

/* The names of the signed headers, joined by ';'. */
static bool signed_names(const struct s3_signing *in, char *out, size_t size)
{
    size_t used = 0;
    out[0] = 0;
    for (size_t i = 0; i < in->headers; i++) {
        int n = snprintf(out + used, size - used, "%s%s", i ? ";" : "", in->header[i].name);
        if (n < 0 || (size_t)n >= size - used)
            return false;
        used += (size_t)n;
    }
    return true;
}

/* A value without blanks around it, and one for several inside. */
static void feed_value(EVP_MD_CTX *c, const char *v)
{
    bool blank = false, any = false;
    for (; *v; v++) {
        if (*v == ' ' || *v == '\t') {
            blank = true;
            continue;
        }
        if (blank && any)
            EVP_DigestUpdate(c, " ", 1);
        blank = false;
        any = true;
        EVP_DigestUpdate(c, v, 1);
    }
}

static void feed(EVP_MD_CTX *c, const char *text, const char *end)
{
    EVP_DigestUpdate(c, text, strlen(text));
    EVP_DigestUpdate(c, end, strlen(end));
}

/* hex(SHA256(canonical request)) */
static bool canonical_hash(const struct s3_signing *in, const char *names, char out[S3_SHA256_HEX_BYTES])
{
    unsigned char hash[HASH_BYTES];
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    bool ok = c && EVP_DigestInit_ex(c, EVP_sha256(), NULL);
    if (ok) {
        feed(c, in->method, "\n");
        feed(c, in->path, "\n");
        feed(c, in->query, "\n");
        for (size_t i = 0; i < in->headers; i++) {
            feed(c, in->header[i].name, ":");
            feed_value(c, in->header[i].value);
            feed(c, "", "\n");
        }
        feed(c, "\n", names);
        feed(c, "\n", in->payload);
        ok = EVP_DigestFinal_ex(c, hash, NULL);
    }
    EVP_MD_CTX_free(c);
    if (ok)
        hex(hash, sizeof hash, out);
    return ok;
}

static bool signing_key(const struct s3_signing *in, const char *date, unsigned char out[HASH_BYTES])
{
    char first[4 + 256];
    int n = snprintf(first, sizeof first, "AWS4%s", in->secret_key);
    bool ok = n > 0 && (size_t)n < sizeof first && hmac(first, (size_t)n, date, out) &&
              hmac(out, HASH_BYTES, in->region, out) && hmac(out, HASH_BYTES, in->service, out) &&
              hmac(out, HASH_BYTES, "aws4_request", out);
    OPENSSL_cleanse(first, sizeof first);
    return ok;
}

status *s3_sign(const struct s3_signing *in, char out[S3_AUTHORIZATION_BYTES])
{
    char names[1024], date[9], scope[SCOPE_BYTES], request[S3_SHA256_HEX_BYTES], text[512], sign[S3_SHA256_HEX_BYTES];
    unsigned char key[HASH_BYTES], mac[HASH_BYTES];
    snprintf(date, sizeof date, "%.8s", in->time);
    int n = snprintf(scope, sizeof scope, "%s/%s/%s/aws4_request", date, in->region, in->service);
    if (n < 0 || (size_t)n >= sizeof scope || !signed_names(in, names, sizeof names))
        return ERR(INVALID, "the region \"%.100s\" or the headers are too long to sign", in->region);
    if (!canonical_hash(in, names, request))
        return ERR(INTERNAL, "libcrypto: SHA-256 failed");
    snprintf(text, sizeof text, "AWS4-HMAC-SHA256\n%s\n%s\n%s", in->time, scope, request);
    bool ok = signing_key(in, date, key) && hmac(key, sizeof key, text, mac);
    OPENSSL_cleanse(key, sizeof key);
    if (!ok)
        return ERR(INTERNAL, "libcrypto: HMAC failed");
    hex(mac, sizeof mac, sign);
    n = snprintf(out, S3_AUTHORIZATION_BYTES, "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,Signature=%s",
                 in->access_key, scope, names, sign);
    return n > 0 && n < S3_AUTHORIZATION_BYTES ? NULL : ERR(INVALID, "the access key id is too long to sign with");
}
