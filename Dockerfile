# The gateway for production: PostgreSQL by DATABASE_URL, Redis by REDIS_URL. Nothing secret is in the image.
FROM node:22-bookworm-slim AS build
WORKDIR /app
COPY package.json package-lock.json ./
# No dependency needs its install script.
RUN npm ci --ignore-scripts
COPY tsconfig.json tsconfig.build.json vite.config.ts ./
COPY src ./src
# The optional dependency is the embedded PostgreSQL, which an image has no use for.
RUN npm run build && npm prune --ignore-scripts --omit=dev --omit=optional

FROM node:22-bookworm-slim
ENV NODE_ENV=production
WORKDIR /app
COPY --from=build /app/package.json ./
COPY --from=build /app/node_modules ./node_modules
COPY --from=build /app/dist ./dist
COPY drizzle ./drizzle
USER node
EXPOSE 3000
# It listens when the schema is up to date, which may take minutes. The admin listener answers on loopback, also where ADMIN_HOST opens it to all addresses.
# Sick until told otherwise: where the connection ends as soon as it is made, fetch may neither succeed nor fail.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
  CMD ["node", "-e", "process.exitCode = 1; fetch('http://127.0.0.1:' + (process.env.ADMIN_PORT || 3001) + '/livez').then((answer) => process.exit(answer.ok ? 0 : 1), () => {})"]
ENTRYPOINT ["node", "dist/main.js"]
CMD ["serve"]
