{{- define "aftercommit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "aftercommit.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- if .component }}
app.kubernetes.io/component: {{ .component }}
{{- end }}
{{- end -}}

{{/* Labels of an object. A key that the chart sets cannot be set again. */}}
{{- define "aftercommit.labels" -}}
{{- $own := include "aftercommit.selector" . | fromYaml -}}
{{- $own = merge $own (dict "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) "app.kubernetes.io/version" .root.Chart.AppVersion "app.kubernetes.io/managed-by" .root.Release.Service) -}}
{{- merge $own (default dict .extra) .root.Values.commonLabels | toYaml -}}
{{- end -}}

{{- define "aftercommit.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "aftercommit.labels" . | nindent 2 }}
{{- $annotations := merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "aftercommit.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{/* Refuses what a process cannot be started with, by name. */}}
{{- define "aftercommit.checkLogin" -}}
{{- $ways := list -}}
{{- range $way := list "creds" "nkey" "token" -}}
{{- if (dig (printf "%sSecret" $way) "name" "" $.nats) -}}{{- $ways = append $ways (printf "%sSecret" $way) -}}{{- end -}}
{{- end -}}
{{- if .nats.user -}}{{- $ways = append $ways "user" -}}{{- end -}}
{{- if gt (len $ways) 1 -}}
{{- fail (printf "%s.nats has several ways to log in, of which one is needed: %s" .path (join ", " $ways)) -}}
{{- end -}}
{{- $password := dig "passwordSecret" "name" "" .nats -}}
{{- if and .nats.user (not $password) -}}{{- fail (printf "%s.nats.user needs %s.nats.passwordSecret.name" .path .path) -}}{{- end -}}
{{- if and $password (not .nats.user) -}}{{- fail (printf "%s.nats.passwordSecret needs %s.nats.user" .path .path) -}}{{- end -}}
{{- end -}}

{{/* A file of an existing secret or ConfigMap: the volume and where it is mounted. Whole directories, so that a changed secret arrives. */}}
{{- define "aftercommit.file" -}}
mounts:
  - { name: {{ .volume }}, mountPath: /etc/aftercommit/{{ .volume }}, readOnly: true }
volumes:
  - name: {{ .volume }}
    {{- if .configMap }}
    configMap:
      name: {{ .configMap }}
    {{- else }}
    secret:
      secretName: {{ .secret }}
      defaultMode: 0440
    {{- end }}
      items:
        {{- range $key, $path := .items }}
        - { key: {{ $key | quote }}, path: {{ $path | quote }} }
        {{- end }}
{{- end -}}

{{/* How a database is reached: env, mounts, volumes. `variable` is DATABASE_URL_FILE or OUTBOX_DATABASE_URL_FILE. */}}
{{- define "aftercommit.database" -}}
{{- $name := dig "urlSecret" "name" "" .database -}}
{{- if not $name -}}{{- fail (printf "%s.urlSecret.name is missing: the existing secret with the URL of the database" .path) -}}{{- end -}}
{{- $volume := default "database" .volume -}}
{{- $env := list (dict "name" (default "DATABASE_URL_FILE" .variable) "value" (printf "/etc/aftercommit/%s/url" $volume)) -}}
{{- $parts := include "aftercommit.file" (dict "volume" $volume "secret" $name "items" (dict (dig "urlSecret" "key" "url" .database) "url")) | fromYaml -}}
{{- $mounts := $parts.mounts -}}
{{- $volumes := $parts.volumes -}}
{{- if .session -}}
{{- with .root.Values.postgres.caSecret -}}
{{- if .name -}}
{{- $ca := include "aftercommit.file" (dict "volume" "postgres-ca" "secret" .name "items" (dict .key "ca.crt")) | fromYaml -}}
{{- $mounts = concat $mounts $ca.mounts -}}{{- $volumes = concat $volumes $ca.volumes -}}
{{- $env = append $env (dict "name" "PGSSLROOTCERT" "value" "/etc/aftercommit/postgres-ca/ca.crt") -}}
{{- end -}}
{{- end -}}
{{- with (dig "clientCertSecret" "name" "" .database) -}}
{{- $cert := include "aftercommit.file" (dict "volume" "postgres-client" "secret" . "items" (dict "tls.crt" "tls.crt" "tls.key" "tls.key")) | fromYaml -}}
{{- $mounts = concat $mounts $cert.mounts -}}{{- $volumes = concat $volumes $cert.volumes -}}
{{- $env = concat $env (list (dict "name" "PGSSLCERT" "value" "/etc/aftercommit/postgres-client/tls.crt") (dict "name" "PGSSLKEY" "value" "/etc/aftercommit/postgres-client/tls.key")) -}}
{{- end -}}
{{- if .database.pgbouncer -}}{{- $env = append $env (dict "name" "AFTERCOMMIT_PGBOUNCER" "value" "true") -}}{{- end -}}
{{- $env = append $env (dict "name" "AFTERCOMMIT_SCHEMA" "value" .root.Values.system.schema) -}}
{{- end -}}
{{- dict "env" $env "mounts" $mounts "volumes" $volumes | toYaml -}}
{{- end -}}

{{/* How NATS is reached, and the names of the stream. */}}
{{- define "aftercommit.nats" -}}
{{- include "aftercommit.checkLogin" . -}}
{{- $v := .root.Values -}}
{{- $env := list (dict "name" "NATS_URL" "value" $v.nats.url) -}}
{{- $mounts := list -}}{{- $volumes := list -}}
{{- $items := dict -}}{{- $secret := "" -}}
{{- range $way, $variable := dict "creds" "NATS_CREDS" "nkey" "NATS_NKEY" "token" "NATS_TOKEN_FILE" "password" "NATS_PASSWORD_FILE" -}}
{{- with (dig (printf "%sSecret" $way) "name" "" $.nats) -}}
{{- $secret = . -}}
{{- $key := dig (printf "%sSecret" $way) "key" (get (dict "creds" "user.creds" "nkey" "user.nk" "token" "token" "password" "password") $way) $.nats -}}
{{- $items = dict $key $way -}}
{{- $env = append $env (dict "name" $variable "value" (printf "/etc/aftercommit/nats/%s" $way)) -}}
{{- end -}}
{{- end -}}
{{- with .nats.user -}}{{- $env = append $env (dict "name" "NATS_USER" "value" .) -}}{{- end -}}
{{- if $secret -}}
{{- $login := include "aftercommit.file" (dict "volume" "nats" "secret" $secret "items" $items) | fromYaml -}}
{{- $mounts = concat $mounts $login.mounts -}}{{- $volumes = concat $volumes $login.volumes -}}
{{- end -}}
{{- if $v.nats.caSecret.name -}}
{{- $ca := include "aftercommit.file" (dict "volume" "nats-ca" "secret" $v.nats.caSecret.name "items" (dict $v.nats.caSecret.key "ca.crt")) | fromYaml -}}
{{- $mounts = concat $mounts $ca.mounts -}}{{- $volumes = concat $volumes $ca.volumes -}}
{{- $env = append $env (dict "name" "NATS_CA" "value" "/etc/aftercommit/nats-ca/ca.crt") -}}
{{- end -}}
{{- with $v.nats.clientCertSecret.name -}}
{{- $cert := include "aftercommit.file" (dict "volume" "nats-client" "secret" . "items" (dict "tls.crt" "tls.crt" "tls.key" "tls.key")) | fromYaml -}}
{{- $mounts = concat $mounts $cert.mounts -}}{{- $volumes = concat $volumes $cert.volumes -}}
{{- $env = concat $env (list (dict "name" "NATS_CERT" "value" "/etc/aftercommit/nats-client/tls.crt") (dict "name" "NATS_KEY" "value" "/etc/aftercommit/nats-client/tls.key")) -}}
{{- end -}}
{{- if $v.nats.tlsFirst -}}{{- $env = append $env (dict "name" "NATS_TLS_FIRST" "value" "true") -}}{{- end -}}
{{- if and $v.nats.domain .nats.apiPrefix -}}{{- fail (printf "nats.domain and %s.nats.apiPrefix say the same: set one of them" .path) -}}{{- end -}}
{{- with $v.nats.domain -}}{{- $env = append $env (dict "name" "NATS_DOMAIN" "value" .) -}}{{- end -}}
{{- with .nats.apiPrefix -}}{{- $env = append $env (dict "name" "NATS_API_PREFIX" "value" .) -}}{{- end -}}
{{- with .nats.inboxPrefix -}}{{- $env = append $env (dict "name" "NATS_INBOX_PREFIX" "value" .) -}}{{- end -}}
{{- $env = concat $env (list (dict "name" "AFTERCOMMIT_STREAM" "value" $v.system.stream) (dict "name" "AFTERCOMMIT_SUBJECT_PREFIX" "value" $v.system.subjectPrefix) (dict "name" "AFTERCOMMIT_SOURCE" "value" $v.system.source)) -}}
{{- dict "env" $env "mounts" $mounts "volumes" $volumes | toYaml -}}
{{- end -}}

{{/* Refuses variables that come twice, and secrets that would stand in the Deployment for everybody to read. */}}
{{- define "aftercommit.checkEnv" -}}
{{- $seen := dict -}}
{{- range .env -}}
{{- if hasKey $seen .name -}}{{- fail (printf "%s: the variable %s is set by the chart or comes twice; use the chart's value" $.path .name) -}}{{- end -}}
{{- $_ := set $seen .name true -}}
{{- if and (hasKey . "value") (has .name (list "DATABASE_URL" "OUTBOX_DATABASE_URL" "SUBSCRIBER_DATABASE_URL" "NATS_PASSWORD" "NATS_TOKEN" "PGPASSWORD")) -}}
{{- fail (printf "%s: %s with `value` would stand in the Deployment for everybody to read; use the chart's values for secrets, or `valueFrom`" $.path .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
The spec of a pod. `parts` is a list of {env, mounts, volumes}; `component`, `path`, `image`, `command`, `args`, `settings` (resources and
where it runs), `http`, `restart`.
*/}}
{{- define "aftercommit.pod" -}}
{{- $v := .root.Values -}}
{{- $env := list -}}{{- $mounts := list -}}{{- $volumes := list -}}
{{- range .parts -}}
{{- $env = concat $env (default list .env) -}}{{- $mounts = concat $mounts (default list .mounts) -}}{{- $volumes = concat $volumes (default list .volumes) -}}
{{- end -}}
{{- if ne .container "roles" -}}
{{- with $v.log.level -}}{{- $env = append $env (dict "name" "RUST_LOG" "value" .) -}}{{- end -}}
{{- $env = append $env (dict "name" "AFTERCOMMIT_LOG_FORMAT" "value" $v.log.format) -}}
{{- end -}}
{{- $env = concat $env $v.pods.extraEnv (default list .settings.extraEnv) -}}
{{- include "aftercommit.checkEnv" (dict "env" $env "path" .path) -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $v.pods.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with $v.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $v.pods.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
restartPolicy: {{ .restart }}
terminationGracePeriodSeconds: {{ $v.terminationGracePeriodSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int64 $v.pods.runAsUser }}
  runAsGroup: {{ int64 $v.pods.runAsGroup }}
  fsGroup: {{ int64 $v.pods.runAsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with (merge (dict) (default dict .settings.nodeSelector) $v.pods.nodeSelector) }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with (concat (default list .settings.tolerations) $v.pods.tolerations) }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .settings.affinity }}
affinity:
  {{- toYaml .settings.affinity | nindent 2 }}
{{- else if .spread }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      {{- range $weight, $key := dict "100" "kubernetes.io/hostname" "50" "topology.kubernetes.io/zone" }}
      - weight: {{ $weight }}
        podAffinityTerm:
          topologyKey: {{ $key }}
          labelSelector:
            matchLabels:
              {{- include "aftercommit.selector" (dict "root" $.root "component" $.component) | nindent 14 }}
      {{- end }}
{{- end }}
containers:
  - name: {{ .container }}
    image: {{ include "aftercommit.image" (dict "root" .root "image" .image) | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    command: {{ toJson .command }}
    args: {{ toJson .args }}
    {{- with $env }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      privileged: false
      capabilities: { drop: [ALL] }
    resources:
      {{- toYaml (default dict .settings.resources) | nindent 6 }}
    {{- if .http }}
    ports:
      - { name: http, containerPort: {{ $v.http.port }}, protocol: TCP }
    livenessProbe:
      httpGet: { path: /healthz, port: http }
      {{- toYaml $v.probes.liveness | nindent 6 }}
    readinessProbe:
      httpGet: { path: /readyz, port: http }
      {{- toYaml $v.probes.readiness | nindent 6 }}
    {{- end }}
    {{- with $mounts }}
    volumeMounts:
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- with $volumes }}
volumes:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A Deployment around such a pod. */}}
{{- define "aftercommit.deployment" -}}
{{- $v := .root.Values -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "aftercommit.metadata" . | nindent 2 }}
spec:
  {{- if not .autoscaled }}
  replicas: {{ .replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  strategy:
    rollingUpdate: { maxSurge: 1, maxUnavailable: 0 }
    type: RollingUpdate
  selector:
    matchLabels:
      {{- include "aftercommit.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- $labels := merge (include "aftercommit.selector" . | fromYaml) (dict "app.kubernetes.io/version" .root.Chart.AppVersion) }}
        {{- if .http }}{{- $_ := set $labels "aftercommit/metrics" "true" }}{{- end }}
        {{- toYaml (merge $labels (default dict .settings.labels) $v.pods.labels $v.commonLabels) | nindent 8 }}
      {{- with (merge (dict) (default dict .podAnnotations) (default dict .settings.annotations) $v.pods.annotations) }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "aftercommit.pod" (merge (dict "restart" "Always") .) | nindent 6 }}
{{- end -}}

{{/* A job that runs before an installation and before each upgrade. */}}
{{- define "aftercommit.job" -}}
{{- $v := .root.Values -}}
apiVersion: batch/v1
kind: Job
metadata:
  {{- include "aftercommit.metadata" (merge (dict "annotations" (include "aftercommit.hook" .weight | fromYaml)) .) | nindent 2 }}
spec:
  backoffLimit: {{ $v.jobs.backoffLimit }}
  activeDeadlineSeconds: {{ $v.jobs.activeDeadlineSeconds }}
  template:
    metadata:
      labels:
        {{- toYaml (merge (include "aftercommit.selector" . | fromYaml) $v.pods.labels $v.commonLabels) | nindent 8 }}
      {{- with $v.pods.annotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "aftercommit.pod" (merge (dict "restart" "Never" "settings" (dict "resources" $v.jobs.resources)) .) | nindent 6 }}
{{- end -}}

{{- define "aftercommit.hook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{/* The ConfigMap with the file of a worker or of the pruner: {configMap, key}. */}}
{{- define "aftercommit.config" -}}
{{- $existing := dig "existingConfigMap" "name" "" .config -}}
{{- $inline := default "" .config.inline -}}
{{- if and $existing $inline -}}{{- fail (printf "%s.config has both existingConfigMap and inline; one is needed" .path) -}}{{- end -}}
{{- if not (or $existing $inline .optional) -}}{{- fail (printf "%s.config needs existingConfigMap.name or inline" .path) -}}{{- end -}}
{{- if $existing -}}
configMap: {{ $existing }}
key: {{ dig "existingConfigMap" "key" .file .config }}
{{- else if $inline -}}
configMap: {{ .own }}
key: {{ .file }}
{{- end -}}
{{- end -}}
